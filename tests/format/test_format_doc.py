"""docs/format.md is the specification: its decoder, examples and numbers are run against what we write."""

import ast
import hashlib
import json
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from paley.core import grids, packing
from paley.core.grids import AnyGrid
from paley.core.hadamard import hadamard
from paley.core.rounding import Outliers, Quantized, codes_per_row
from paley.core.schemes import LinearScheme, WeightScheme
from paley.core.transforms import random_signs
from paley.format.digests import Digests, seal_model
from paley.format.files import write_json
from paley.format.spec import QuantizationConfig, encode_linear
from paley.format.writer import ShardWriter

DOC = (Path(__file__).parents[2] / "docs" / "format.md").read_text(encoding="utf-8")
GAUSSIAN = json.loads(resources.files("paley.core").joinpath("tables/gaussian.json").read_text())["points"]
TABLES = resources.files("paley.core").joinpath("tables")
GRIDS = [f"{family}{bits}" for family in grids.FAMILIES for bits in range(2, 9)]
GRIDS += [
    "nf4",
    "af3",
    "p1n9",
    "p2n16",
    "p2n88",
    "p2n256",
    "p3n830",
    "p4n4096",
    "e8q3k9",
    "e8q14k4",
    "trellis1",
    "trellis2.5",
    "trellis4",
    "trellis5",
    "trellis6",
]
GRIDS += ["free1", "free2", "free3", "mirror1", "mirror2", "mirror4"]
GRIDS = [*map(grids.load, GRIDS), grids.custom(torch.arange(21).reshape(7, 3) / 10)]
OUT = 5


def block(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", DOC, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def decode():
    space: dict = {}
    exec(compile(block("python"), "docs/format.md", "exec"), space)
    return space["weight"]


def test_the_decoder_knows_a_changed_tensor(tmp_path):
    space: dict = {}
    exec(compile(block("python"), "docs/format.md", "exec"), space)
    generator = torch.Generator().manual_seed(1)
    write(tmp_path, {"up": random_linear(grids.load("int4"), 24, 3, generator)}, 2**30)
    seal_model(tmp_path)
    names = Digests.load(tmp_path).tensors
    assert set(names) == {"up.bias", "up.codes", "up.scales"}
    assert all(space["is_as_written"](tmp_path, name) for name in names)
    section = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert section["digest"] == Digests.load(tmp_path).digest
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    assert [name for name in names if not space["is_as_written"](tmp_path, name)] == ["up.codes"]


def random_linear(grid: AnyGrid, in_features: int, groups: int, generator: torch.Generator) -> Quantized:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(0, grid.size, shape, generator=generator).to(grid.code_dtype)

    # All magnitudes that float16 has, the subnormal ones too.
    if grid.free:
        points = (
            torch.exp2(torch.rand(OUT, groups, *grid.scale_shape, generator=generator) * 38 - 23).half().sort(-1).values
        )
        return Quantized(draw(OUT, in_features), points, None, grid, in_features)
    scales = torch.exp2(torch.rand(OUT, groups, generator=generator) * 38 - 23).half()
    zeros = draw(OUT, groups) if grid.affine else None
    codes = draw(OUT, codes_per_row(in_features, grid.p))
    return Quantized(codes, scales, zeros, grid, in_features)


def write(folder: Path, linears: dict[str, Quantized], max_shard_bytes: int) -> None:
    slots = {
        name: LinearScheme(
            WeightScheme("int4", q.group_size if q.scales.shape[1] > 1 else None).on_grid(q.grid),
            outliers=0 if q.outliers is None else len(q.outliers.columns),
        )
        for name, q in linears.items()
    }
    section = QuantizationConfig(linears=slots, attentions={}).to_dict()
    write_json(folder / "config.json", {"model_type": "llama", "quantization_config": section})
    with ShardWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        for name, q in linears.items():
            writer.add(f"{name}.bias", torch.ones(OUT, dtype=torch.bfloat16))
            for tensor_name, tensor in encode_linear(name, q).items():
                writer.add(tensor_name, tensor)


@pytest.mark.parametrize("max_shard_bytes", [2**30, 2000])
def test_the_decoder_reads_every_grid_at_every_width(tmp_path, decode, max_shard_bytes):
    generator = torch.Generator().manual_seed(1)
    linears = {
        f"model.layers.{width}.{grid.name}.{groups}": random_linear(grid, width, groups, generator)
        for grid in GRIDS
        for width, groups in [(1, 1), (8, 1), (13, 1), (24, 3), (35, 5), (39, 3)]
    }
    for grid in ("int3", "uint2", "free2"):
        columns = torch.tensor([0, 5, 23], dtype=torch.int32)
        codes = torch.randint(0, 256, (OUT, 3), generator=generator).to(torch.uint8)
        outliers = Outliers(columns, codes, torch.rand(OUT, 1, generator=generator).half() + 0.1)
        linears[f"outliers.{grid}"] = replace(random_linear(grids.load(grid), 24, 3, generator), outliers=outliers)
    write(tmp_path, linears, max_shard_bytes)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_bytes == 2000)
    for name, q in linears.items():
        got = decode(tmp_path, name, q.width, TABLES)
        assert got.dtype == np.float32
        assert np.array_equal(got, q.dequantize().numpy()), name


def test_the_decoder_stands_alone():
    imported = {
        alias.name
        for node in ast.walk(ast.parse(block("python")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported == {"json", "struct", "zlib", "numpy"}


def test_the_example_config_is_one():
    data = json.loads(block("json"))
    config = QuantizationConfig.from_dict(data)
    assert config.linears["model.layers.0.mlp.down_proj"].transform.out_dim == 48
    assert config.attentions["model.layers.0.self_attn"].keys.grid.name == "int4"


def test_the_example_bytes_are_right():
    codes, packed = re.search(r"codes ([\d ]+) are the bytes `([0-9A-F ]+)`", DOC).groups()
    codes = torch.tensor([int(c) for c in codes.split()], dtype=torch.uint8)
    assert bytes(packing.pack(codes, 3).tolist()) == bytes.fromhex(packed)


def test_the_example_signs_are_right():
    seed, signs = re.search(r"Seed (\d+) begins with `([+-]+)`", DOC).groups()
    assert random_signs(len(signs), int(seed)).tolist() == [1.0 if s == "+" else -1.0 for s in signs]


def test_the_gaussian_points_are_those_of_the_table():
    found = re.findall(r"- (\d) bits: ([\d., ]+)", DOC)
    assert [bits for bits, _ in found] == ["2", "3"]
    for bits, numbers in found:
        assert [float(number) for number in numbers.split(",")] == GAUSSIAN[bits]


@pytest.mark.parametrize(
    ("order", "sha256"),
    [
        (24, "9c52b69d8b03ff1e"),  # Sylvester ⊗ Paley I
        (28, "75a65a7aa5dd6380"),  # Paley I over GF(27)
        (100, "6b328e214074ec0d"),  # Paley II over GF(49)
        (92, "d4d2a5202f1445d9"),  # a table
    ],
)
def test_hadamard_matrices_are_part_of_the_format(order, sha256):
    """A matrix that changes makes every checkpoint with an online transform of its order wrong."""
    assert hashlib.sha256(hadamard(order).numpy().tobytes()).hexdigest()[:16] == sha256
