"""An equal of a model with other weights, so that no quantizer profits from the grid that its published file came from.

Gains of norms move in part into the linears that read them; values and the MLP's gated wire are rescaled, and the
linear behind each is divided by it. All factors are random. The function is the same but for rounding to bfloat16.

python -m studies.off_grid MODEL OUTPUT [--seed N] [--check TEXT]
--check: the KL between the two over 4 x 512 tokens of a text, into studies/results/off-grid.json; an OUTPUT that is
there stays as it is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from studies.experiment import RESULTS, provenance, read, save
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paley.arch import Linear, Norm
from paley.data import token_blocks
from paley.eval.perplexity import evaluate
from paley.eval.reference import Reference
from paley.model.adapter import Adapter
from paley.model.loading import open_source

SPREAD = 0.3  # standard deviation of the factors' logarithms


def move_off_grid_(model: PreTrainedModel, seed: int) -> None:
    """Rescales the weights of a dense model in place; products are taken in float64."""
    adapter, generator = Adapter(model), torch.Generator().manual_seed(seed)
    row, config = adapter.architecture, model.config
    if any(linear.experts or linear.parts for linear in row.linears()):
        raise SystemExit(f"{config.model_type}: only models without experts and fused linears are supported")

    def factors(count: int) -> Tensor:
        return (SPREAD * torch.randn(count, generator=generator, dtype=torch.float64)).exp()

    for site in adapter.sites.of("input"):
        if site.norm is None or (adapter.sites.tied and row.head in site.readers):
            continue
        norm = adapter.module(site.norm)
        factor = factors(site.shape[0])
        _set_(norm.weight, (norm.weight.double() + row.gain_offset) / factor - row.gain_offset)
        for path in site.readers:
            weight = adapter.module(path).weight
            _set_(weight, weight.double() * factor)
    heads, group = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    for block in adapter.blocks:
        modules = {part.writes: block.module.get_submodule(part.path) for part in row.linears()}
        readers = {part.reads: block.module.get_submodule(part.path) for part in row.linears()}
        for wire, behind in ((row.values, row.attended), (row.up, row.gated)):
            if isinstance(row.maker(wire), Norm):
                continue
            assert isinstance(row.maker(wire), Linear)
            made, read = modules[wire], readers[behind]
            factor = factors(made.out_features)
            _set_(made.weight, made.weight.double() * factor[:, None])
            if made.bias is not None:
                _set_(made.bias, made.bias.double() * factor)
            if wire == row.values:
                factor = factor.unflatten(0, (heads, -1)).repeat_interleave(group, 0).flatten()
            _set_(read.weight, read.weight.double() / factor)


def _set_(parameter: nn.Parameter, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("output", type=Path, help="folder of the equal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", help="a text")
    arguments = parser.parse_args()
    if arguments.check is None or not arguments.output.exists():
        write(arguments.model, arguments.output, arguments.seed)
    if arguments.check is not None:
        check(arguments.model, arguments.output, arguments.check)


def write(source: Path, output: Path, seed: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    move_off_grid_(model, seed)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(source).save_pretrained(output)


def check(original: Path, equal: Path, text: str) -> None:
    """Both in float32; the KL is what rounding the equal to bfloat16 costs."""
    source, file = open_source(original), RESULTS / "off-grid.json"
    test = token_blocks(text, source.tokenizer(), role="test", count=4, seq_len=512, seed=None, whole=True)
    score = evaluate(open_source(equal).load().float(), test, Reference.of(source.load().float(), test)).to_dict()
    row = {key: score[key] for key in ("kl", "kl_stderr", "top1_agreement")} | provenance()
    print(f"{original.name}: KL {row['kl']:.2g} ± {row['kl_stderr']:.2g}, top-1 {row['top1_agreement']:.2%}")
    save({"models": (read(file.name) or {"models": {}})["models"] | {original.name: row}}, file)


if __name__ == "__main__":
    main()
