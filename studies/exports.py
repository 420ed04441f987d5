"""Exports of a real model, opened by the tools they are made for: studies/results/exports-MODEL.json.

python -m studies.exports MODEL --text FILE [--tokens N] [--greedy N] [--only RE]
Needs `pip install ik-llama-cpp-python==0.1.5 gguf compressed-tensors mlx[cpu] mlx-lm`. Weights are rounded to nearest,
as only the way of the codes is looked at. Each row compares the tool's logits with those of `paley.load` on the folder:
KL, share of equal top tokens, and how many tokens of a greedy text are the same.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from studies.experiment import RESULTS, provenance, read, save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import paley
from paley.recipe import apply_settings, preset

PRESETS = {  # preset -> targets
    "gguf-q4_0": ("gguf",), "gguf-q4_1": ("gguf",), "gguf-q5_0": ("gguf",), "gguf-q5_1": ("gguf",),
    "gguf-q8_0": ("gguf",),
    "ct-w4g128": ("compressed-tensors", "plain"), "ct-w8g128": ("compressed-tensors",), "mlx-3": ("mlx",),
    "mlx-4": ("mlx",), "mlx-8": ("mlx",),
}  # fmt: skip
QUICK = ["test=null", "weights.method=nearest", "weights.scale_search=absmax", "fit_groups=true"]
EVEN = {"gguf-q4_0": "int4", "gguf-q5_0": "int5"}  # grids that absmax leaves without an offset
Logits = Callable[[list[int]], Tensor]  # ids -> [tokens, vocabulary]


@contextmanager
def llama_cpp(folder: Path, tokens: int) -> Iterator[Logits]:
    from ik_llama_cpp import _ctypes_api, _internals

    (file,) = folder.glob("*.gguf")
    model = _internals.IkModel(str(file))
    context = _internals.IkContext(model, n_ctx=tokens, n_threads=torch.get_num_threads(), flash_attn=False)

    def logits(ids: list[int]) -> Tensor:
        batch = _internals.make_batch(ids)
        for index in range(len(ids)):
            batch.logits[index] = 1
        context.kv_cache_clear()
        assert context.decode(batch) == 0
        shape = (model.n_vocab,)
        rows = [np.ctypeslib.as_array(context.get_logits(i), shape=shape).copy() for i in range(len(ids))]
        _ctypes_api.llama_batch_free(batch)
        return torch.from_numpy(np.stack(rows))

    yield logits
    context.close()
    model.close()


@contextmanager
def transformers(folder: Path, tokens: int) -> Iterator[Logits]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yield lambda ids: model(torch.tensor([ids]), use_cache=False).logits[0].float()


@contextmanager
def mlx(folder: Path, tokens: int) -> Iterator[Logits]:
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    yield lambda ids: torch.from_numpy(np.array(model(mx.array([ids])).astype(mx.float32))[0])


TOOLS = {"gguf": llama_cpp, "compressed-tensors": transformers, "plain": transformers, "mlx": mlx}


def greedy(logits: Logits, ids: list[int], count: int) -> list[int]:
    for _ in range(count):
        ids = [*ids, int(logits(ids)[-1].argmax())]
    return ids[-count:]


@torch.no_grad()
def compared(ours: Logits, theirs: Logits, ids: list[int], count: int) -> dict:
    p, q = (logits(ids).double().log_softmax(-1) for logits in (ours, theirs))
    kl = (p.exp() * (p - q)).sum(-1)
    texts = [greedy(logits, ids[:24], count) for logits in (ours, theirs)]
    same = next((i for i, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]), count)
    return {
        "kl": float(kl.mean()), "kl_stderr": float(kl.std() / len(kl) ** 0.5), "tokens": len(ids),
        "top1_agreement": float((p.argmax(-1) == q.argmax(-1)).double().mean()), "greedy_same": same, "greedy": count,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=256, help="of the text, 256 by default")
    parser.add_argument("--greedy", type=int, default=16, help="tokens to write; mlx on a CPU takes seconds for each")
    parser.add_argument("--only", default="", help="rows that this expression finds; others stay as they were")
    arguments = parser.parse_args()
    file = RESULTS / f"exports-{arguments.model.name}.json"
    result = {"model": arguments.model.name, "text": arguments.text.name, **provenance(), "rows": {}}
    result["rows"] = (read(file.name) or result)["rows"] if arguments.only else {}
    text = arguments.text.read_text()[: 20 * arguments.tokens]
    ids = AutoTokenizer.from_pretrained(arguments.model)(text)["input_ids"][: arguments.tokens]
    for name, targets in PRESETS.items():
        wanted = [to for to in targets if re.search(arguments.only, f"{name} {to}")]
        if not wanted:
            continue
        with tempfile.TemporaryDirectory() as place:
            recipe = apply_settings(preset(name), [*QUICK, *([f"weights.grid={EVEN[name]}"] if name in EVEN else [])])
            out = paley.quantize(arguments.model, recipe, output=Path(place, "out")).output
            model = paley.load(out, product="dense")
            for to in wanted:
                start = time.time()
                made = paley.export_to(out, to, output=Path(place, to))
                row = {"bytes": made.bytes, "types": dict(made.types), "notes": list(made.notes)}
                with TOOLS[to](made.output, arguments.tokens + arguments.greedy) as theirs:
                    ours = lambda ids, model=model: model(torch.tensor([ids]), use_cache=False).logits[0].float()  # noqa: E731
                    row |= compared(ours, theirs, ids, arguments.greedy)
                result["rows"][f"{name} {to}"] = row
                save(result, file)
                told = (
                    f"KL {row['kl']:.2e} top-1 {row['top1_agreement']:.3f} greedy {row['greedy_same']}/{row['greedy']}"
                )
                print(f"{name} {to} {told} {row['bytes']:,} bytes {time.time() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
