"""What is lost at equal bytes, all tensors counted, beside llama.cpp's quantizer: studies/results/peers-MODEL.json.

python -m studies.peers MODEL --text FILE --test-text FILE [--gguf FILE] [--only RE]
MODEL should be what `studies.off_grid` makes of a published model. FILE is any GGUF file of the same model, whose keys
are used. llama.cpp gets the importance matrix of the very text that our recipes calibrate on. --auto-round,
--llm-compressor, --gptq-model, --data-free (hqq and bitsandbytes): interpreters that have them (`quantizers.py`).
"""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

import torch
from studies.experiment import Experiment, Quantization
from studies.llama_cpp import Peer
from studies.quantizers import QUANTIZERS, run
from torch import Tensor
from transformers import PreTrainedModel

from paley.eval.perplexity import evaluate
from paley.export.gguf import export_gguf
from paley.pipeline.saving import save_checkpoint
from paley.recipe import apply_settings, preset, under_budget
from paley.recipe.targets import TARGETS

KINDS = (
    "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K_M", "IQ4_XS", "IQ4_NL", "Q4_0", "Q4_K_S", "Q4_1", "Q4_K_M", "Q5_0",
    "Q5_K_M", "Q6_K", "Q8_0",
)  # fmt: skip
# By itself llama.cpp keeps a tied embedding at 8 bits, which is most of a small model: also with fewer.
SMALLER = (
    ("IQ2_S", "iq4_nl"), ("IQ3_XXS", "iq4_nl"), ("IQ4_XS", "iq4_nl"), ("Q4_K_S", "q5_0"), ("Q4_K_M", "q5_0"),
    ("Q5_K_M", "q6_0"),
)  # fmt: skip
BUDGETS = (2.5, 3.25, 4.25, 5.25)  # bits over all tensors


def _on(weights: str, outer: str) -> tuple[str, ...]:
    return (f"weights.grid={weights}", f"embedding.grid={outer}", f"head.grid={outer}")


OURS = {  # name -> preset, settings
    **{
        f"trellis{w:g}, GPTQ, e{e:g}": (f"w{int(w)}a16", _on(f"trellis{w:g}", f"trellis{e:g}"))
        for w, e in ((2, 3), (2.5, 3.5), (3, 4), (3.5, 4), (4, 5))
    },
    "trellis4, GPTQ, e6": ("w4a16", ()),
    "trellis4, GPTQ, e16": ("w4a16e16h16", ()),
    "trellis5, GPTQ, e6": ("w5a16", ()),
    "trellis4, GPTQ, e6 of single values": ("w4a16", _on("trellis4", "p1n64")),
    "trellis6, GPTQ, e6": ("w6a16", ()),
    "trellis6, GPTQ, e8": ("w6a16e8h8", ()),
    "p2n4096, GPTQ, e8": ("vectors-w6a16e8h8", ()),
    "p2n256, GPTQ, e6": ("vectors-w4a16", ()),
    **{f"trellis{bits}, diagonal": (f"balanced-{bits}", ()) for bits in (2, 3, 4, 5)},
    "p2n256, diagonal": ("balanced-4", ("weights.grid=p2n256",)),
    "p2n256": ("higgs-4", ()),
    **{name: (name, ()) for name in TARGETS if name.startswith("gguf-")},
}


def main() -> None:
    parser = Experiment.parser(__doc__, calibration=16, search=0, test=8)
    parser.add_argument("--gguf", type=Path, help="a GGUF file of the model, for its keys; none: our rows alone")
    for package in dict.fromkeys(package for package, _, _ in QUANTIZERS.values()):
        parser.add_argument(f"--{package.replace('_', '-')}", type=Path, help="a Python interpreter that has it")
    arguments = parser.parse_args()
    experiment = Experiment("peers", arguments)
    parameters = experiment.result["parameters"]

    def ours(name: str, settings: tuple[str, ...], **limits: float) -> dict:
        recipe = apply_settings(preset(name), list(settings))
        made = experiment.quantize(under_budget(recipe, **limits) if limits else recipe)
        return made.row | (as_gguf(made) if name.startswith("gguf-") else {})

    def as_gguf(made: Quantization) -> dict:
        """Of the file that it becomes: bytes of all tensors, and their types."""
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder, "out"), made.model, made.problem)
            file = export_gguf(Path(folder, "out"), output=Path(folder, "gguf"))
        return {"bits": 8 * file.bytes / parameters, "bytes": file.bytes, "types": dict(file.types)}

    def scored(model: PreTrainedModel, weights: dict[str, Tensor], nbytes: float) -> dict:
        """The model takes the weights."""
        with torch.no_grad():
            for name, value in weights.items():
                model.get_parameter(name).copy_(value)
        score = evaluate(model, experiment.blocks.test, experiment.reference).to_dict()
        return score | {"bits": 8 * nbytes / parameters, "bytes": nbytes}

    def theirs_alone(python: Path, code: str, bits: float) -> dict:
        with tempfile.TemporaryDirectory() as folder:
            weights, row = run(python, code, Path(arguments.model), experiment.blocks.calibration.ids, Path(folder))
        quantized = sum(value.numel() for value in weights.values())
        nbytes = (quantized * bits + (parameters - quantized) * 16) / 8
        return scored(experiment.source.load().float(), weights, nbytes) | row

    for name, (base, settings) in OURS.items():
        experiment.row(name, functools.partial(ours, base, settings))
    for bits in BUDGETS:
        measure = functools.partial(ours, "w4a16", (), size=int(bits * parameters / 8))
        experiment.row(f"budget of {bits:g} bits, GPTQ", measure)
    for name, (package, code, bits) in QUANTIZERS.items():
        if python := getattr(arguments, package):
            experiment.row(name, functools.partial(theirs_alone, python.absolute(), code, bits))
    if arguments.gguf is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        model = experiment.source.load().float()
        peer = Peer(model, arguments.gguf, Path(folder))
        peer.write()
        peer.write_matrix(experiment.blocks.calibration.ids)
        original = {name: value.clone() for name, value in model.state_dict().items()}

        def theirs(kind: str, embedding: str | None = None) -> dict:
            start = time.time()
            weights, nbytes, kinds = peer.quantize(kind, embedding)
            seconds = {"quantize": round(time.time() - start, 1)}
            return scored(model, weights, nbytes) | {"types": kinds, "seconds": seconds}

        for kind in KINDS:
            experiment.row(f"llama.cpp {kind}", functools.partial(theirs, kind))
        for kind, embedding in SMALLER:
            row = f"llama.cpp {kind}, embedding {embedding.upper()}"
            experiment.row(row, functools.partial(theirs, kind, embedding))
        model.load_state_dict(original)


if __name__ == "__main__":
    main()
