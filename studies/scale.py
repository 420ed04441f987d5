"""Where does data-free quantization stop scaling with nodes? Writes studies/results/scale.json and prints a table.

python -m studies.scale [--measure] [--cores 16] [--storage 10] [--network 3]

A clock runs the stages of `paley quantize --ray-address` for the shapes of a 70 B and a 671 B checkpoint, on 1, 8 and
64 nodes: the driver checks and fingerprints the model, workers take one weight after the other in the order in which
they are sent, the driver gathers the codes and reads them back. A worker reads by its share of its node's network and
of the storage, whichever is less. Rates of a core are measured here with --measure, else taken from the file; storage,
network (GB a second) and cores are what you give. Nothing of the models but their shapes exists here.
"""

from __future__ import annotations

import argparse
import hashlib
import heapq
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench.record import provenance, save
from transformers import DeepseekV3Config, LlamaConfig

from paley.core.transforms import Transform
from paley.format.checkpoint import first_not_finite
from paley.format.header import as_bytes
from paley.methods.nearest import turned_parts
from paley.model.loading import empty_model
from paley.model.walk import sites_of
from paley.recipe import preset

FILE = Path(__file__).parent / "results" / "scale.json"
NODES = (1, 8, 64)
BITS = 4.03  # stored for each weight
MODELS = {
    "70 B": lambda: LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
    "671 B": DeepseekV3Config,
}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """Of one core: weights quantized a second; bytes a second that are checked and hashed, hashed, and copied."""

    quantized: float
    checked: float
    hashed: float
    copied: float


@dataclass(frozen=True)
class Place:
    """A cluster: nodes with so many cores; bytes a second of the shared storage, and of a node's network."""

    nodes: int
    cores: int
    storage: float
    network: float

    @property
    def alone(self) -> float:
        """Bytes a second of one process that nobody disturbs."""
        return min(self.storage, self.network)

    def shared(self, count: int) -> float:
        """Bytes a second of each of so many workers that read and write at a time, spread over the nodes."""
        return min(self.alone, self.network * self.nodes / count, self.storage / count)


def tasks(model: str, *, by_expert: bool) -> list[int]:
    """Weights of each task: of a tensor, or, of a stack of experts, also of each expert."""
    found: list[int] = []
    for site in sites_of(empty_model(MODELS[model]())).weights:
        parts = max(1, site.experts) if by_expert else 1
        found += [site.numel // parts] * parts
    return found


def stages(weights: list[int], rates: Rates, place: Place) -> dict[str, float]:
    """Seconds of each stage."""
    read, written = 2 * sum(weights), sum(weights) * BITS / 8
    moved = [n * (2 + BITS / 8) for n in weights]
    return {
        "checking the checkpoint": read / min(place.alone, rates.checked),
        "quantizing weights": makespan(moved, [n / rates.quantized for n in weights], place),
        "writing the checkpoint": 2 * written / place.alone + written / rates.copied,
        "reading back and sealing": 2 * written / place.alone + 2 * written / rates.hashed,
    }


def makespan(moved: list[float], computed: list[float], place: Place) -> float:
    """The end of the last task, if each worker that is free takes the next one: first its bytes, then its seconds.

    All that read share the rate, so that one count of the bytes that each has got since the beginning serves for all.
    """
    waiting = list(zip(moved, computed, strict=True))[::-1]
    free, now, got = place.nodes * place.cores, 0.0, 0.0
    reading: list[tuple[float, float]] = []  # (count at which it has all its bytes, seconds then)
    computing: list[float] = []  # when it is done
    while waiting or reading or computing:
        while waiting and free:
            size, seconds = waiting.pop()
            heapq.heappush(reading, (got + size, seconds))
            free -= 1
        rate = place.shared(len(reading)) if reading else 1.0
        arrives = now + (reading[0][0] - got) / rate if reading else float("inf")
        if computing and computing[0] <= arrives:
            got += (computing[0] - now) * rate if reading else 0.0
            now = heapq.heappop(computing)
            free += 1
        else:
            got, seconds = heapq.heappop(reading)
            now = arrives
            heapq.heappush(computing, now + seconds)
    return now


def table(rates: Rates, cores: int, storage: float, network: float) -> Iterator[dict]:
    for model in MODELS:
        for by_expert in (False, True):
            weights = tasks(model, by_expert=by_expert)
            if by_expert and len(weights) == len(tasks(model, by_expert=False)):
                continue  # it has no experts
            one = None
            for nodes in NODES:
                found = stages(weights, rates, Place(nodes, cores, storage, network))
                total = sum(found.values())
                one = one or total
                share = found["quantizing weights"] / total
                yield {
                    "model": model, "tasks": "experts" if by_expert else "tensors", "count": len(weights),
                    "largest": max(weights), "nodes": nodes, "seconds": {k: round(v, 1) for k, v in found.items()},
                    "total": round(total, 1), "speedup": round(one / total, 2), "share_of_workers": round(share, 3),
                }  # fmt: skip


def measured() -> Rates:
    """On this machine, in processor time of one thread: other work changes it little."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2048, 4096, generator=generator).bfloat16()
    scheme, transform = preset("higgs-4").weights, Transform(4096, 4096, 1024, 1)
    assert scheme is not None
    scheme = replace(scheme, group_size=transform.order)
    quantized = _rate(lambda: list(turned_parts(weight, scheme, transform, "")), weight.numel())

    def check() -> None:
        assert first_not_finite(weight) is None
        hashlib.sha256(as_bytes(weight)).digest()

    with tempfile.TemporaryDirectory() as folder:
        copied = _rate(lambda: (Path(folder) / "codes").write_bytes(bytes(as_bytes(weight))), weight.nbytes)
    hashed = _rate(lambda: hashlib.sha256(as_bytes(weight)).digest(), weight.nbytes)
    return Rates(quantized, _rate(check, weight.nbytes), hashed, copied)


def _rate(work: Callable[[], object], amount: int, seconds: float = 2.0) -> float:
    work()
    start, count = time.process_time(), 0
    while (taken := time.process_time() - start) < seconds or not count:
        work()
        count += 1
    return amount * count / taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--cores", type=int, default=16, help="of a node")
    parser.add_argument("--storage", type=float, default=10.0, help="GB/s of the shared storage")
    parser.add_argument("--network", type=float, default=3.0, help="GB/s of a node")
    arguments = parser.parse_args()
    if arguments.measure or not FILE.exists():
        result = {**provenance(), "threads": 1, "rates": asdict(measured())}
    else:
        result = json.loads(FILE.read_text())
    given = {"cores": arguments.cores, "storage": arguments.storage * 1e9, "network": arguments.network * 1e9}
    result |= {**given, "bits": BITS, "rows": list(table(Rates(**result["rates"]), **given))}
    save(result, FILE)
    print("| model | tasks | nodes | check | quantize | write | read back | total | speed-up |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        seconds = " | ".join(f"{s:,.0f} s" for s in row["seconds"].values())
        tasks_ = f"{row['count']:,} {row['tasks']}"
        print(f"| {row['model']} | {tasks_} | {row['nodes']} | {seconds} | {row['total']:,.0f} s | {row['speedup']} |")


if __name__ == "__main__":
    main()
