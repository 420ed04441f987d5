"""An equal of a model with other weights, so that no quantizer profits from the grid that its published file came from.

Gains of norms move in part into the linears that read them; values and the MLP's gated wire are rescaled, and the
linear behind each is divided by it. All factors are random. The function is the same but for rounding to bfloat16.

python -m studies.off_grid MODEL OUTPUT [--seed N]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from paley.arch import Linear, Norm
from paley.model.adapter import Adapter

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
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    move_off_grid_(model, arguments.seed)
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.model).save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
