import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core import files
from paley.core.errors import PaleyError
from paley.core.files import write_atomic, write_whole
from paley.format.checkpoint import Checkpoint
from paley.format.files import write_json
from paley.format.writer import ShardWriter, write_tensors

TENSORS = {
    "b.codes": torch.arange(7, dtype=torch.uint8),
    "a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "c.scales": torch.ones(5, dtype=torch.float16),
    "d": torch.tensor(1, dtype=torch.int64),
    "ä.empty": torch.empty(2, 0, dtype=torch.bfloat16),
}


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS, **options: int) -> dict[str, bytes]:
    """-> all files of the folder."""
    with ShardWriter(folder, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return contents(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what is written --------------------------------------------------------------------------------------


def test_golden_bytes(tmp_path):
    tensors = {"b": torch.tensor([1, 2, 3], dtype=torch.uint8), "a": torch.tensor([[1.0], [-2.0]]).half()}
    header = (
        b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    )
    header += b" " * (-len(header) % 8)
    raw = len(header).to_bytes(8, "little") + header + b"\x00\x3c\x00\xc0\x01\x02\x03"
    assert write(tmp_path / "a", tensors) == {"model.safetensors": raw}
    write_tensors(tmp_path / "x", tensors)
    assert (tmp_path / "x").read_bytes() == raw


def test_the_library_reads_it_aligned(tmp_path):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(path).items())
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    for name, tensor in TENSORS.items():
        assert header[name]["data_offsets"][0] % tensor.dtype.itemsize == 0


def test_metadata_stands_beside_the_tensors(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, TENSORS, {"source": "naïve", "format": "other"})
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"format": "other", "source": "naïve"}
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in load_file(path).items())
    again = tmp_path / "y"
    write_tensors(again, dict(reversed(TENSORS.items())), {"format": "other", "source": "naïve"})
    assert again.read_bytes() == path.read_bytes()


def test_shards_and_index(tmp_path):
    tensors = {f"layer.{i}": torch.full((10,), i, dtype=torch.float32) for i in (2, 0, 1, 3, 4)}
    found = write(tmp_path, tensors | {"big": torch.zeros(100)}, max_shard_bytes=80)
    shards = [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert list(found) == [*shards, "model.safetensors.index.json"]
    index = json.loads(found["model.safetensors.index.json"])
    assert index == {
        "metadata": {"total_size": 5 * 40 + 400},
        "weight_map": {
            "big": shards[3],
            "layer.0": shards[0],
            "layer.1": shards[1],
            "layer.2": shards[0],
            "layer.3": shards[1],
            "layer.4": shards[2],
        },
    }
    assert list(index["weight_map"]) == sorted(index["weight_map"])
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors.get(name, torch.zeros(100)))


def test_the_same_tensors_make_the_same_bytes(tmp_path):
    first = write(tmp_path / "a", max_shard_bytes=40)
    assert len(first) > 2
    assert write(tmp_path / "b", max_shard_bytes=40) == first


def test_in_one_file_the_order_does_not_matter(tmp_path):
    assert write(tmp_path / "a") == write(tmp_path / "b", dict(reversed(TENSORS.items())))


def test_tensors_may_change_after_they_were_added(tmp_path):
    tensor = torch.ones(3, 4)
    with ShardWriter(tmp_path) as writer:
        writer.add("plain", tensor)
        writer.add("turned", tensor.T)
        writer.add("wide", torch.ones(1, requires_grad=True).expand(5))
        tensor.zero_()
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["plain"], torch.ones(3, 4))
    assert torch.equal(found["turned"], torch.ones(4, 3))
    assert torch.equal(found["wide"], torch.ones(5))


def test_memory_is_bounded_by_a_shard(tmp_path):
    writer = ShardWriter(tmp_path, max_shard_bytes=1000)
    for i in range(50):
        writer.add(str(i), torch.zeros(100, dtype=torch.uint8))
        assert sum(t.nbytes for t in writer._pending.values()) <= 1000
    assert len(list(tmp_path.glob(".model-*.tmp"))) == 4
    writer.close()


def test_transformers_loads_the_shards(tmp_path):
    sizes = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    write_json(tmp_path / "config.json", model.config.to_dict())
    write(tmp_path, model.state_dict(), max_shard_bytes=900)
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[name], tensor)


# --- misuse -----------------------------------------------------------------------------------------------


def test_misuse_is_refused(tmp_path):
    with pytest.raises(PaleyError, match="max_shard_bytes must be positive"):
        ShardWriter(tmp_path / "a", max_shard_bytes=0)
    writer = ShardWriter(tmp_path / "a")
    with pytest.raises(PaleyError, match="no tensors were added"):
        writer.close()
    writer.add("x", torch.ones(1))
    with pytest.raises(PaleyError, match="tensor 'x' was added before"):
        writer.add("x", torch.ones(1))
    with pytest.raises(PaleyError, match=r"y: safetensors files hold no torch.complex128"):
        writer.add("y", torch.ones(1, dtype=torch.complex128))
    with pytest.raises(PaleyError, match="can be called '__metadata__'"):
        writer.add("__metadata__", torch.ones(1))
    writer.close()
    writer.close()
    with pytest.raises(PaleyError, match="'z' comes too late"):
        writer.add("z", torch.ones(1))
    with pytest.raises(PaleyError, match=r"holds model.safetensors already"):
        ShardWriter(tmp_path / "a")
    with pytest.raises(PaleyError, match=r"model.safetensors: cannot be written"):
        ShardWriter(tmp_path / "a" / "model.safetensors")


def test_an_error_inside_the_with_block_leaves_nothing(tmp_path):
    def fail():
        with ShardWriter(tmp_path, max_shard_bytes=10) as writer:
            for name, tensor in TENSORS.items():
                writer.add(name, tensor)
            assert contents(tmp_path)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert contents(tmp_path) == {}


# --- a disk that is full, a process that is killed --------------------------------------------------------


class Disk:
    """Takes `room` bytes; then every write fails as the system says it."""

    def __init__(self, room: int, code: int = errno.ENOSPC):
        self.room, self.code = room, code

    def write(self, file, chunk) -> None:
        taken = min(self.room, len(chunk))
        file.write(chunk[:taken])
        self.room -= taken
        if taken < len(chunk):
            raise OSError(self.code, os.strerror(self.code))


def total_written(folder: Path, monkeypatch) -> int:
    disk = Disk(10**9)
    monkeypatch.setattr(files, "_write", disk.write)
    write(folder, max_shard_bytes=60)
    return 10**9 - disk.room


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path, monkeypatch):
    total = total_written(tmp_path / "enough", monkeypatch)
    for room in [*range(0, total, 37), total - 1]:
        folder = tmp_path / str(room)
        monkeypatch.setattr(files, "_write", Disk(room).write)
        with pytest.raises(PaleyError, match=rf"{room}: the disk is full.* needs [\d,]+ bytes, [\d,]+ are free"):
            write(folder, max_shard_bytes=60)
        assert contents(folder) == {}


def test_the_error_says_how_much_was_needed(tmp_path, monkeypatch):
    write_tensors(tmp_path / "whole", {"a": torch.zeros(10_000)})
    size = (tmp_path / "whole").stat().st_size
    monkeypatch.setattr(files, "_write", Disk(100).write)
    with pytest.raises(PaleyError, match=f"{tmp_path}: the disk is full.*needs {size:,} bytes"):
        write_tensors(tmp_path / "cut", {"a": torch.zeros(10_000)})


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    write_atomic(tmp_path / "file", "old")
    monkeypatch.setattr(files, "_write", Disk(2).write)
    with pytest.raises(PaleyError, match="the disk is full"):
        write_atomic(tmp_path / "file", "newer")
    assert contents(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize(("sizes", "name"), [(60, "model.safetensors"), (10, "model-00001.safetensors")])
@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "{name} needs "), (errno.EIO, "{name}: cannot be written")])
def test_the_error_speaks_of_the_model_and_not_of_a_temporary_file(tmp_path, monkeypatch, sizes, name, code, said):
    monkeypatch.setattr(files, "_write", Disk(5, code).write)
    with pytest.raises(PaleyError) as error:
        write(tmp_path, {"a": torch.zeros(10), "b": torch.zeros(5)}, max_shard_bytes=sizes)
    assert said.format(name=name) in str(error.value)
    assert ".tmp" not in str(error.value)


def test_other_errors_of_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_write", Disk(5, errno.EIO).write)
    with pytest.raises(PaleyError, match="cannot be written: Input/output error"):
        write(tmp_path)
    assert contents(tmp_path) == {}
    monkeypatch.undo()
    with pytest.raises(PaleyError, match="cannot be written: No such file or directory"):
        write_atomic(tmp_path / "none" / "file", "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PaleyError, match="folder: cannot be written: "):
        write_atomic(tmp_path / "folder", "text")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_a_rename_that_fails_leaves_nothing(tmp_path, monkeypatch):
    total, real = 0, os.replace

    def replace(before, after):
        nonlocal total
        total += 1
        if total == 2:
            raise OSError(errno.EIO, "broken")
        real(before, after)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(PaleyError, match=r"model-00002-of-0000\d.safetensors: cannot be written: broken"):
        write(tmp_path, max_shard_bytes=60)
    assert contents(tmp_path) == {}


KILLED = """
import os, sys, torch
from paley.core import files
from paley.format.writer import ShardWriter

torch.set_num_threads(1)
root = sys.argv[1]

def work(folder, at):  # the process dies at its call number `at` to the system
    calls = 0
    def counted(real):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == at:
                os._exit(9)
            return real(*args)
        return call
    files._write, os.replace, os.fsync = counted(files._write), counted(os.replace), counted(os.fsync)
    with ShardWriter(folder, max_shard_bytes=100) as writer:
        for i in range(4):
            writer.add(f"t{i}", torch.full((60,), i, dtype=torch.uint8))

at, status = 0, 9
while status == 9:
    at += 1
    if os.fork() == 0:
        work(f"{root}/{at}", at)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
print(at, status)
"""


def test_a_writer_killed_anywhere_leaves_no_half_named_file(tmp_path):
    """In a shard, between shards, between renames: what bears its name is whole; readers see all or none."""
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.endswith(" 0\n"), done.stderr
    last = int(done.stdout.split()[0])  # the one that nothing killed, or only after its work
    named = set()
    for at in range(1, last + 1):
        folder = tmp_path / str(at)
        write_json(folder / "config.json", {})
        shards = list(folder.glob("model-*-of-00004.safetensors"))
        for path in shards:
            assert len(load_file(path)) == 1
        named.add(len(shards))
        if (folder / "model.safetensors.index.json").exists():
            assert [int(t[0]) for _, t in Checkpoint.open(folder).items()] == list(range(4))
            continue
        with pytest.raises(PaleyError, match=r"no model.safetensors.index.json"):
            Checkpoint.open(folder)
        if not shards:  # a new writer starts where the killed one left its temporary files
            write(folder)
            assert list(contents(folder)) == ["config.json", "model.safetensors"]
    assert last > 15
    assert named == set(range(5))


# --- small files ------------------------------------------------------------------------------------------


def test_write_atomic(tmp_path):
    write_atomic(tmp_path / "a", "grün\n")
    write_atomic(str(tmp_path / "a"), b"\x00\xff")
    write_atomic(tmp_path / "b", "grün\n")
    assert contents(tmp_path) == {"a": b"\x00\xff", "b": "grün\n".encode()}


def test_two_writers_of_one_file_leave_one_of_them_whole(tmp_path):
    def chunks():
        yield b"one half, "
        write_atomic(tmp_path / "a", "in between")
        assert contents(tmp_path)["a"] == b"in between"
        yield b"the other"

    write_whole(tmp_path / "a", chunks(), 19)
    assert contents(tmp_path) == {"a": b"one half, the other"}


def test_write_atomic_has_the_permissions_of_any_new_file(tmp_path):
    write_atomic(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1], "a": "ä"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "b": [\n    1\n  ],\n  "a": "ä"\n}\n'
    for bad in ({"x": float("nan")}, {"x": {1}}):
        with pytest.raises(PaleyError, match=r"a.json: cannot be written as JSON"):
            write_json(tmp_path / "a.json", bad)
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": [1], "a": "ä"}
