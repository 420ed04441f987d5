"""Reading: every damage has a name. Writing: in tests/format/test_writer.py."""

import hashlib
import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paley.core.errors import PaleyError
from paley.format.checkpoint import Checkpoint, first_not_finite, read_tensors
from paley.format.files import write_json
from paley.format.header import DTYPES
from paley.format.writer import ShardWriter, write_tensors

CONFIG = {"model_type": "llama", "hidden_size": 8, "text_config": {"dtype": "float16", "rope_theta": 1e4}}
TENSORS = {
    "model.embed.weight": torch.arange(40, dtype=torch.float32).reshape(10, 4),
    "model.layers.0.codes": torch.arange(7, dtype=torch.uint8),
    "model.layers.0.scales": torch.tensor([[0.5], [2.0]], dtype=torch.float16),
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "nothing": torch.empty(0, 3),
}


def write(folder: Path, tensors: dict[str, Tensor] = TENSORS, max_shard_bytes: int = 2**30) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "config.json", CONFIG)
    with ShardWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return folder


def split_file(path: Path) -> tuple[dict, bytes]:
    """-> (header, data)."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    return json.loads(raw[8:end]), raw[end:]


def put_header(path: Path, header: object, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# --- sound folders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [2**30, 100, 1])
def test_what_was_written_is_read(tmp_path, max_shard_bytes):
    checkpoint = Checkpoint.open(write(tmp_path, max_shard_bytes=max_shard_bytes))
    assert checkpoint.config == CONFIG
    assert checkpoint.names == list(checkpoint) == sorted(TENSORS)
    assert len(checkpoint) == 6
    assert checkpoint.nbytes == sum(t.nbytes for t in TENSORS.values())
    for name, tensor in TENSORS.items():
        assert name in checkpoint
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.tensor(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert torch.equal(checkpoint[name], tensor)
    assert [name for name, _ in checkpoint.items()] == checkpoint.names


def test_what_the_library_writes_is_read(tmp_path):
    tensors = {
        f"{kind}.{i}": torch.arange(5).to(dtype)
        for i, (kind, dtype) in enumerate(DTYPES.items())
        if kind not in ("U64", "U32", "U16")  # arange of these is not everywhere
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "more": "text"})
    write_json(tmp_path / "config.json", CONFIG)
    for name, tensor in Checkpoint.open(tmp_path).items():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor.view(torch.uint8), tensors[name].view(torch.uint8))


def test_a_tensor_is_the_readers_own(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path))
    checkpoint.tensor("model.embed.weight").zero_()
    assert torch.equal(checkpoint.tensor("model.embed.weight"), TENSORS["model.embed.weight"])


def test_an_unknown_name_gets_a_hint(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path))
    for ask in (checkpoint.tensor, checkpoint.shape, checkpoint.dtype):
        with pytest.raises(PaleyError, match=r"no tensor 'model.norm.weigth'; did you mean 'model.norm.weight'\?"):
            ask("model.norm.weigth")


def test_files_beyond_four_gigabytes(tmp_path):
    """Sparse, so that it takes no room: the end of the first tensor times its begin exceeds 64 bits."""
    size = 3 * 2**31
    header = {
        "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        "b": {"dtype": "U8", "shape": [2], "data_offsets": [size, size + 2]},
    }
    put_header(tmp_path / "model.safetensors", header, b"")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(0, os.SEEK_END)
        start = file.tell()
        file.truncate(start + size)
        file.seek(start + size)
        file.write(b"\x07\x09")
    write_json(tmp_path / "config.json", CONFIG)
    assert Checkpoint.open(tmp_path).tensor("b").tolist() == [7, 9]


# --- fingerprint ------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_contents_not_of_files(tmp_path):
    one = write(tmp_path / "one")
    many = write(tmp_path / "many", dict(reversed(TENSORS.items())), max_shard_bytes=50)
    volatile = {"transformers_version": "9", "_name_or_path": "x", "torch_dtype": "y", "dtype": "z"}
    config = {"hidden_size": 8, **volatile, "text_config": {"rope_theta": 1e4}, "model_type": "llama"}
    write_json(many / "config.json", config)
    assert Checkpoint.open(one).fingerprint() == Checkpoint.open(many).fingerprint()


def test_the_fingerprint_is_pinned(tmp_path):
    """Plans name models by it: what it covers, and how, must not change."""
    tensor = torch.tensor([[1.0, -2.0]], dtype=torch.float16)
    write(tmp_path, {"w": tensor})
    text = b'{"hidden_size":8,"model_type":"llama","text_config":{"rope_theta":10000.0}}\n'
    text += b'["w","torch.float16",[1,2]]\n'
    assert Checkpoint.open(tmp_path).fingerprint() == hashlib.sha256(text + b"\x00\x3c\x00\xc0").hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"scalar": torch.tensor(3.25, dtype=torch.float64)},
        {"scalar": torch.tensor([3.5], dtype=torch.float64)},
        {"model.norm.weight": torch.ones(3, dtype=torch.float16)},
        {"another": torch.ones(1)},
    ],
)
def test_the_fingerprint_sees_every_change_of_a_tensor(tmp_path, change):
    before = Checkpoint.open(write(tmp_path / "a")).fingerprint()
    assert Checkpoint.open(write(tmp_path / "b", TENSORS | change)).fingerprint() != before


def test_the_fingerprint_sees_the_config(tmp_path):
    before = Checkpoint.open(write(tmp_path)).fingerprint()
    write_json(tmp_path / "config.json", CONFIG | {"text_config": {"rope_theta": 2e4}})
    assert Checkpoint.open(tmp_path).fingerprint() != before


# --- finite -----------------------------------------------------------------------------------------------


def test_finite_checkpoints_pass(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path))
    assert checkpoint.fingerprint(check_finite=True) == checkpoint.fingerprint()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_that_is_not_finite_is_named(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr("paley.format.checkpoint._CHUNK", 7)
    bad = torch.ones(4, 5)
    bad[2, 3] = bad[3, 3] = value
    folder = write(tmp_path, TENSORS | {"model.layers.1.w": bad.to(dtype), "model.layers.2.w": bad})
    with pytest.raises(PaleyError, match=rf"model.safetensors: model.layers.1.w holds {value} at \[2, 3\]"):
        Checkpoint.open(folder).fingerprint(check_finite=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_place_hides_what_is_not_finite(dtype):
    for place in range(150):
        for value in (float("nan"), float("inf"), float("-inf")):
            tensor = torch.ones(150, dtype=dtype)
            tensor[place] = value
            index, found = first_not_finite(tensor) or ((-1,), 0.0)
            assert (index, str(found)) == ((place,), str(value))


# --- damaged folders --------------------------------------------------------------------------------------


def refused(folder: Path, match: str) -> None:
    with pytest.raises(PaleyError, match=match):
        Checkpoint.open(folder)


def test_no_folder(tmp_path):
    refused(tmp_path / "none", "none: no such folder; give the folder")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "file: is a file; give the folder")
    refused(tmp_path, "no config.json here")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (b"{", "config.json: is not valid JSON"),
        (b"", "config.json: is not valid JSON .*; copy or download it again"),
        (b"\xff{}", "config.json: is not UTF-8 text"),
        (b'{"a": 1, "a": 2}', "config.json: the key 'a' is given twice"),
        (b"[" * 10**5, "config.json: is not valid JSON"),
        (b"[]", "config.json: expected a mapping of keys to values, got list"),
    ],
)
def test_a_config_that_is_none(tmp_path, text, complaint):
    write(tmp_path)
    (tmp_path / "config.json").write_bytes(text)
    refused(tmp_path, complaint)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_not_opened(tmp_path, file):
    write_json(tmp_path / "config.json", CONFIG)
    (tmp_path / file).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    refused(tmp_path, rf"{file}\).* any code; .*save_pretrained\(NEW_FOLDER\)")


def test_no_weights(tmp_path):
    write_json(tmp_path / "config.json", CONFIG)
    refused(tmp_path, r"no model.safetensors and no model.safetensors.index.json here")


def sharded(folder: Path) -> tuple[Path, Path]:
    """-> (the index, the shard that holds model.embed.weight)."""
    index = write(folder, max_shard_bytes=100) / "model.safetensors.index.json"
    return index, folder / json.loads(index.read_text())["weight_map"]["model.embed.weight"]


def test_a_missing_shard_or_index(tmp_path):
    index, shard = sharded(tmp_path)
    shard.rename(tmp_path / "elsewhere")
    refused(tmp_path, f"{shard.name}: is missing, though model.safetensors.index.json names it")
    index.unlink()
    refused(tmp_path, "holds shards, but no model.safetensors.index.json")


def test_a_tensor_the_index_promises_is_not_there(tmp_path):
    _, shard = sharded(tmp_path)
    save_file({"model.embed.weigth": torch.ones(1)}, shard)
    refused(tmp_path, f"{shard.name}: tensor 'model.embed.weight' is missing.* 'model.embed.weigth'")


def test_a_tensor_the_index_does_not_know(tmp_path):
    _, shard = sharded(tmp_path)
    save_file({"model.embed.weight": torch.ones(1), "stowaway": torch.ones(1)}, shard)
    refused(tmp_path, f"{shard.name}: tensor 'stowaway' is not in model.safetensors.index.json")


def test_both_kinds_of_weights(tmp_path):
    sharded(tmp_path)
    save_file(TENSORS, tmp_path / "model.safetensors")
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json")


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
     "..", "", "x.bin", "a\0.safetensors", 7, None, ["x.safetensors"]],
)  # fmt: skip
def test_an_index_that_leads_elsewhere(tmp_path, file):
    folder = tmp_path / "folder"
    index, shard = sharded(folder)
    for other in (tmp_path, folder / "sub"):
        other.mkdir(exist_ok=True)
        (other / "x.safetensors").write_bytes(shard.read_bytes())
    index.write_text(json.dumps({"weight_map": {"model.embed.weight": file}}))
    refused(folder, "index.json: 'model.embed.weight' is said to be in .*; only safetensors files of the same")


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{", "null"])
def test_an_index_that_is_none(tmp_path, text):
    index, _ = sharded(tmp_path)
    index.write_text(text)
    refused(tmp_path, "index.json: (must have|is not valid JSON|expected a mapping)")


def test_links_as_in_the_hub_cache_are_followed(tmp_path):
    folder = write(tmp_path / "snapshot")
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    assert "scalar" in Checkpoint.open(folder)


# --- damaged files ----------------------------------------------------------------------------------------


def test_a_file_cut_off_anywhere(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    raw = path.read_bytes()
    for length in range(len(raw)):
        path.write_bytes(raw[:length])
        refused(tmp_path, "model.safetensors: (truncated|no safetensors file)")
    path.write_bytes(raw + b"\0")
    refused(tmp_path, "corrupted: 1 bytes follow the last tensor")


def test_a_shard_cut_off(tmp_path):
    _, shard = sharded(tmp_path)
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, f"{shard.name}: truncated")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**8 + 1, 10**8, 2000, 0, 1])
def test_a_header_of_another_length(tmp_path, length):
    path = write(tmp_path) / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(tmp_path, "model.safetensors: (truncated|no safetensors file|corrupted header)")


FOUR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
BAD_HEADERS = {
    "overlap": {"a": FOUR, "b": FOUR},
    "overlap by one": {"a": FOUR, "b": {"dtype": "U8", "shape": [9], "data_offsets": [7, 16]}},
    "gap": {"a": FOUR, "b": {"dtype": "U8", "shape": [7], "data_offsets": [9, 16]}},
    "gap in front": {"a": {**FOUR, "data_offsets": [8, 16]}},
    "too short": {"a": FOUR},
    "beyond the end": {"a": {"dtype": "U8", "shape": [17], "data_offsets": [0, 17]}},
    "huge": {"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
    "huge product": {"a": {"dtype": "U8", "shape": [2**62] * 8, "data_offsets": [0, 16]}},
    "huge numbers": {"a": {"dtype": "U8", "shape": [10**4000], "data_offsets": [0, 10**4000]}},
    "many dimensions": {"a": {"dtype": "U8", "shape": [1] * 10**5 + [16], "data_offsets": [0, 16]}},
    "huge and empty": {"a": {"dtype": "U8", "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}},
    "backwards": {"a": {**FOUR, "data_offsets": [8, 0]}},
    "negative offset": {"a": {**FOUR, "data_offsets": [-8, 0]}},
    "negative shape": {"a": {"dtype": "U8", "shape": [-4, -4], "data_offsets": [0, 16]}},
    "shape and offsets disagree": {"a": {**FOUR, "data_offsets": [0, 16]}},
    "one offset": {"a": {**FOUR, "data_offsets": [8]}},
    "three offsets": {"a": {**FOUR, "data_offsets": [0, 8, 16]}},
    "float": {"a": {"dtype": "U8", "shape": [16.0], "data_offsets": [0, 16]}},
    "true": {"a": {"dtype": "U8", "shape": [16, True], "data_offsets": [0, 16]}},
    "text": {"a": {"dtype": "U8", "shape": "16", "data_offsets": [0, 16]}},
    "dtype": {"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 16]}},
    "list as dtype": {"a": {"dtype": [], "shape": [4], "data_offsets": [0, 16]}},
    "no dtype": {"a": {"shape": [16], "data_offsets": [0, 16]}},
    "more keys": {"a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16], "file": "../x"}},
    "no entry": {"a": None},
    "no object": [],
    "metadata": {"__metadata__": {"format": 1}, "a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}},
    "metadata list": {"__metadata__": [], "a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}},
    "no JSON": b'{"a": ',
    "no UTF-8": b'{"\xff": 1}',
    "deep": b"[" * 10**5,
    "digits": b'{"a": ' + b"9" * 10**4 + b"}",
    "name twice": b'{"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16]},'
    b'"a":{"dtype":"I8","shape":[16],"data_offsets":[0,16]}}',
}


@pytest.mark.parametrize("what", BAD_HEADERS)
def test_a_header_that_lies(tmp_path, what):
    put_header(tmp_path / "model.safetensors", BAD_HEADERS[what], b"\0" * 16)
    write_json(tmp_path / "config.json", CONFIG)
    refused(tmp_path, "model.safetensors: (corrupted|truncated)")


def test_random_bytes_in_the_header_never_pass_where_the_library_refuses(tmp_path):
    path = write(tmp_path) / "model.safetensors"
    raw = path.read_bytes()
    end = len(raw) - len(split_file(path)[1])
    chance = random.Random(0)
    refusals = 0
    for _ in range(600):
        damaged = bytearray(raw)
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            damaged[chance.randrange(end)] = chance.choice([chance.randrange(256), *b'0129[]{},:"'])
        path.write_bytes(damaged)
        try:
            for name, tensor in Checkpoint.open(tmp_path).items():
                assert tensor.nbytes == len(tensor.flatten().view(torch.uint8)), name
        except PaleyError:
            refusals += 1
            continue
        try:
            with safe_open(path, framework="pt") as opened:
                assert sorted(opened.keys()) == Checkpoint.open(tmp_path).names
        except SafetensorError as error:
            pytest.fail(f"accepted what the library refuses: {error}: {bytes(damaged[:end])!r}")
    assert refusals > 400


def test_a_file_that_shrinks_after_opening(tmp_path):
    checkpoint = Checkpoint.open(write(tmp_path))
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PaleyError, match="became shorter"):
        list(checkpoint.items())
    path.unlink()
    with pytest.raises(PaleyError, match="cannot be read: No such file"):
        checkpoint.tensor("scalar")


def test_single_files(tmp_path):
    path = tmp_path / "block.safetensors"
    write_tensors(path, TENSORS)
    found = read_tensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], TENSORS[name]) for name in found)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(PaleyError, match=r"block.safetensors: truncated"):
        read_tensors(path)
    with pytest.raises(PaleyError, match="none: cannot be read: No such file"):
        read_tensors(tmp_path / "none")
