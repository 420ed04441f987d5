"""What embedding and head lose at fewer bits, all else as it is: writes studies/results/outer-MODEL.json.

python -m studies.outer MODEL [--text FILE] [--test-text FILE] [--test N] [--seq-len N] [--bits 16,8,6,5,4]
python -m studies.outer MODEL --base w4a16 --calibration 16 --bits 16,6
A row for each number b of bits is the preset BASEe{b}h{b}. The base `higgs-w16a16` quantizes nothing else, and its row
at 16 bits is the original as stored in 16 bits. Another base, under which the blocks have fewer bits too, has a file of
its own, outer-BASE-MODEL.json. Bytes are those of all tensors in the saved folder.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from studies.experiment import Experiment, Quantization

from paley.format.checkpoint import Checkpoint
from paley.pipeline.accounting import parameter_count
from paley.pipeline.saving import save_checkpoint
from paley.recipe import preset

BASE, BITS = "higgs-w16a16", (16, 8, 6, 5, 4)
SCORES = ("kl", "kl_stderr", "gap", "gap_stderr", "perplexity", "perplexity_stderr", "top1_agreement")


def stored_bytes(found: Quantization) -> int:
    """Of all tensors in the folder that the model is saved as."""
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), found.model, found.problem)
        return Checkpoint.open(Path(folder)).nbytes


def measure(experiment: Experiment, name: str, bits: int) -> dict:
    found, source = experiment.quantize(preset(name)), experiment.source
    size, errors = stored_bytes(found), found.rel_errors()
    outer = [site.name for site in source.sites.of("embedding", "head")]
    return {
        "bits": bits,
        "bytes": size,
        "original_bytes": source.checkpoint.nbytes,
        "bits_per_weight": 8 * size / parameter_count(source),
        **{key: found.row[key] for key in SCORES},
        "rel_error": {name: errors[name] for name in outer if name in errors},
        "seconds": found.row["seconds"],
    }


def main() -> None:
    parser = Experiment.parser(__doc__, calibration=0, search=0, test=96)
    parser.add_argument("--base", default=BASE, help=f"preset that e and h are put to, {BASE} by default")
    parser.add_argument("--bits", default=",".join(map(str, BITS)), help="of embedding and head, comma-separated")
    arguments = parser.parse_args()
    kind = "outer" if arguments.base == BASE else f"outer-{arguments.base}"
    experiment = Experiment(kind, arguments)
    experiment.result["tied"] = experiment.source.sites.tied
    for bits in map(int, arguments.bits.split(",")):
        name = f"{arguments.base}e{bits}h{bits}"
        experiment.row(name, functools.partial(measure, experiment, name, bits))


if __name__ == "__main__":
    main()
