"""Damages finished folders at random, and tells what load and `paley verify` say of each.

    python -m bench.mutations OUT OTHER --count 2000 --seed 0 [--record]

OUT and OTHER are quantized folders; OTHER's parts are mixed into OUT. A copy of OUT is damaged in one place. Then
`paley.load`, in a process of its own, must refuse it in one line, or give the very logits of the sound folder, in at
most twice its memory. What loads and is no longer as written, `paley.verify` must name. All else is a failure.
--record adds the outcome to bench/results/mutations.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

IDS = [[7, 19, 250, 33, 8, 4, 90, 91, 92, 17]]
ODD = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 2**31, 2**63, 10**30, 1e-9, 1e30, -0.5, float("nan"), float("inf"), "",
       "x", "int4", "../x", [], [1], {}, {"a": 1}]  # fmt: skip
Mutation = Callable[[Path, Path, random.Random], str]


def flip_bytes(folder: Path, other: Path, chance: random.Random) -> str:
    """A few bytes of a file, anywhere."""
    file = chance.choice(_files(folder))
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 16])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)
    return file.name


def flip_in_header(folder: Path, other: Path, chance: random.Random) -> str:
    """A byte of the header of the weights."""
    file = chance.choice(sorted(folder.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[chance.randrange(end)] = chance.choice([chance.randrange(256), *b'0123456789[]{},:"'])
    file.write_bytes(data)
    return file.name


def resize(folder: Path, other: Path, chance: random.Random) -> str:
    """A file that is cut off, emptied, repeated, or continued."""
    file = chance.choice(_files(folder))
    data = file.read_bytes()
    file.write_bytes(chance.choice([b"", data[: chance.randrange(len(data))], data + b"\0", data * 2, data[1:]]))
    return file.name


def change_field(folder: Path, other: Path, chance: random.Random) -> str:
    """A value of a JSON file, at any depth, becomes an odd one."""
    file = chance.choice(_documents(folder))
    data = json.loads(file.read_text())
    keys, holder = [], data
    while isinstance(holder, dict | list) and holder:
        key = chance.choice(list(holder)) if isinstance(holder, dict) else chance.randrange(len(holder))
        keys.append(key)
        if not isinstance(holder[key], dict | list) or not holder[key] or chance.random() < 0.1:
            holder[key] = _other_value(holder[key], chance)
            break
        holder = holder[key]
    file.write_text(json.dumps(data))
    return f"{file.name}: {'.'.join(map(str, keys))}"


def drop_field(folder: Path, other: Path, chance: random.Random) -> str:
    """A key of a JSON file is gone, or is renamed."""
    file = chance.choice(_documents(folder))
    data = json.loads(file.read_text())
    holders = list(_holders(data))
    holder = chance.choice(holders)
    key = chance.choice(list(holder))
    value = holder.pop(key)
    if chance.random() < 0.4:
        holder[key + "x"] = value
    file.write_text(json.dumps(data))
    return f"{file.name}: {key}"


def swap_fields(folder: Path, other: Path, chance: random.Random) -> str:
    """Two values of one JSON object change places."""
    file = chance.choice(_documents(folder))
    data = json.loads(file.read_text())
    holder = chance.choice([h for h in _holders(data) if len(h) > 1])
    a, b = chance.sample(list(holder), 2)
    holder[a], holder[b] = holder[b], holder[a]
    file.write_text(json.dumps(data))
    return f"{file.name}: {a}, {b}"


def change_size(folder: Path, other: Path, chance: random.Random) -> str:
    """A size in config.json is another."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    sizes = [key for key, value in config.items() if type(value) is int]
    key = chance.choice(sizes)
    config[key] = chance.choice([config[key] + 1, config[key] * 2, config[key] // 2, 10**6, 2**40, -config[key], 0])
    file.write_text(json.dumps(config))
    return f"config.json: {key} {config[key]}"


def _tensors(folder: Path) -> tuple[Path, dict]:
    from safetensors.torch import load_file

    file = sorted(folder.glob("*.safetensors"))[0]
    return file, load_file(file)


def swap_tensors(folder: Path, other: Path, chance: random.Random) -> str:
    """Two tensors of one type and shape change places."""
    from safetensors.torch import save_file

    file, tensors = _tensors(folder)
    kinds: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.dtype, tensor.shape), []).append(name)
    a, b = chance.sample(chance.choice([names for names in kinds.values() if len(names) > 1]), 2)
    tensors[a], tensors[b] = tensors[b], tensors[a]
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{a}, {b}"


def change_tensor(folder: Path, other: Path, chance: random.Random) -> str:
    """A tensor is zero, permuted, negated, reshaped, retyped, renamed, gone, or there twice."""
    import torch
    from safetensors.torch import save_file

    file, tensors = _tensors(folder)
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    changes = {
        "zero": lambda t: torch.zeros_like(t), "flipped": lambda t: t.flip(0), "rolled": lambda t: t.roll(1, -1),
        "flat": lambda t: t.reshape(-1), "transposed": lambda t: t.reshape(t.shape[::-1]),
        "float64": lambda t: t.double(), "int8": lambda t: t.to(torch.int8), "half": lambda t: t[: len(t) // 2],
        "complement": lambda t: 255 - t if t.dtype == torch.uint8 else -t, "nan": lambda t: t * float("nan"),
        "huge": lambda t: t.float() * 1e4,
    }  # fmt: skip
    what = chance.choice([*changes, "renamed", "gone", "twice"])
    if what in changes:
        tensors[name] = changes[what](tensor).contiguous()
    if what in ("renamed", "gone"):
        del tensors[name]
    if what in ("renamed", "twice"):
        tensors[name + "_"] = tensor.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{name} {what}"


def mix_file(folder: Path, other: Path, chance: random.Random) -> str:
    """A file, or two, of another model."""
    names = sorted({p.name for p in _files(folder)} & {p.name for p in _files(other)})
    taken = chance.sample(names, chance.choice([1, 1, 2]))
    for name in taken:
        shutil.copyfile(other / name, folder / name)
    return ", ".join(taken)


def mix_tensor(folder: Path, other: Path, chance: random.Random) -> str:
    """Some tensors of another model under their own names."""
    from safetensors.torch import save_file

    (file, tensors), (_, others) = _tensors(folder), _tensors(other)
    names = chance.sample(sorted(tensors.keys() & others.keys()), chance.choice([1, 3]))
    save_file(tensors | {name: others[name] for name in names}, file, metadata={"format": "pt"})
    return ", ".join(names)


def mix_section(folder: Path, other: Path, chance: random.Random) -> str:
    """A part of another model's config."""
    file = folder / "config.json"
    config, others = json.loads(file.read_text()), json.loads((other / "config.json").read_text())
    key = chance.choice(["quantization_config", *config])
    if key == "quantization_config" and chance.random() < 0.7:
        inner = chance.choice(list(config[key]))
        config[key][inner] = others[key].get(inner)
        key = f"{key}.{inner}"
    else:
        config[key] = others.get(key)
    file.write_text(json.dumps(config))
    return f"config.json: {key}"


def remove_file(folder: Path, other: Path, chance: random.Random) -> str:
    """A file is missing, or has another's name."""
    file = chance.choice(_files(folder))
    if chance.random() < 0.5:
        file.unlink()
    else:
        file.rename(chance.choice(_files(folder)))
    return file.name


MUTATIONS: tuple[Mutation, ...] = (
    flip_bytes, flip_bytes, flip_in_header, resize, change_field, change_field, drop_field, swap_fields, change_size,
    swap_tensors, change_tensor, mix_file, mix_tensor, mix_section, remove_file,
)  # fmt: skip


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.stat().st_size)


def _documents(folder: Path) -> list[Path]:
    """JSON files, the config more often than the others."""
    return [folder / "config.json"] * 3 + [f for f in sorted(folder.glob("*.json")) if f.name != "tokenizer.json"]


def _holders(data: object):
    if isinstance(data, dict):
        if data:
            yield data
        for value in data.values():
            yield from _holders(value)
    elif isinstance(data, list):
        for value in data:
            yield from _holders(value)


def _other_value(value: object, chance: random.Random) -> object:
    near = []
    if type(value) is int:
        near = [value + 1, value - 1, value * 2, -value]
    elif type(value) is float:
        near = [value * 2, value / 2, -value, value + 1e-3]
    elif type(value) is str and value:
        near = [value[:-1], value + "x", value.swapcase()]
    return chance.choice(near * 3 + ODD)


def judge(folder: Path) -> tuple[str, str, list[list[float]] | None, int]:
    """-> (loads | refused | crashed, in which words, logits, bytes of memory that loading took)."""
    import torch

    import paley
    from paley.core.errors import PaleyError

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        model = paley.load(folder)
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits[0].tolist()
    except PaleyError as error:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        text = str(error)
        return ("refused" if "\n" not in text else "crashed"), text, None, taken * 1024
    except Exception as error:  # a traceback is what a user must not see
        return "crashed", f"{type(error).__name__}: {error}", None, 0
    return "loads", "", logits, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def verified(folder: Path) -> str | None:
    """What `paley verify` finds wrong; None if nothing."""
    import paley
    from paley.core.errors import PaleyError

    try:
        found = paley.verify(folder)
    except PaleyError as error:
        return str(error)
    named = [*found.edited, *found.not_covered]
    return f"named: {', '.join(named)}" if named else None


def _child(folder: Path, pipe: object) -> None:
    try:
        found = (*judge(folder), verified(folder))
    except BaseException as error:  # of verify
        found = ("crashed", f"verify: {type(error).__name__}: {error}", None, 0, None)
    pipe.send(found)  # type: ignore[attr-defined]


def examine(folder: Path, seconds: float = 60) -> tuple:
    """`judge` and `verified` in a process of their own, forked from a server that has the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["paley.hf", "paley.pipeline.verify"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folder, there))
    process.start()
    there.close()
    try:
        found = here.recv() if here.poll(seconds) else ("crashed", f"no answer in {seconds} s", None, 0, None)
    except EOFError:
        found = ("crashed", "the process ended", None, 0, None)
    process.join(2)
    process.kill()
    process.join()
    return found


def run(out: Path, other: Path, count: int, seed: int, *, progress: bool = False) -> tuple[Counter, list[str]]:
    """-> (how many came out how, a line for each failure)."""
    chance, outcomes, failures = random.Random(seed), Counter(), []
    _, _, sound, memory = examine(out)[:4]
    assert sound is not None, "the sound folder does not load"
    with tempfile.TemporaryDirectory() as place:
        for index in range(count):
            folder = Path(place) / "damaged"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(out, folder)
            mutation = chance.choice(MUTATIONS)
            where = mutation(folder, other, chance)
            state, words, logits, taken, named = examine(folder)
            same = logits == sound
            unchanged = _same(out, folder)
            if state == "loads" and (same or unchanged):
                outcome = "loads as before, named by verify" if named else "loads as before"
                bad = not named and not unchanged
            else:
                outcome, bad = ("refused" if state == "refused" else f"{state}: garbage"), state != "refused"
            if taken > 2 * max(memory, 2**25):
                outcome, bad = f"{outcome}, in too much memory", True
            outcomes[outcome] += 1
            if bad:
                failures.append(f"{index} {mutation.__name__} {where}: {outcome}: {words[:300]}")
                print(failures[-1], flush=True)
            if progress and not (index + 1) % 100:
                print(index + 1, dict(outcomes), flush=True)
    return outcomes, failures


def _same(a: Path, b: Path) -> bool:
    return _contents(a) == _contents(b)


def _contents(folder: Path) -> dict[str, object]:
    """Bytes by file; of the digests, which nothing has a digest of, what they say."""
    found: dict[str, object] = {path.name: path.read_bytes() for path in _files(folder)}
    with contextlib.suppress(ValueError, OSError):
        found["digests.json"] = json.loads((folder / "digests.json").read_bytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    counts, failed = run(asked.out, asked.other, asked.count, asked.seed, progress=True)
    result = {"of": asked.out.name, "count": asked.count, "seed": asked.seed, **counts, "failures": len(failed)}
    print(json.dumps(result, indent=2))
    if asked.record:
        record(result)


def record(result: dict) -> None:
    """Adds a run to the file of all of them."""
    from bench.record import RESULTS, provenance, save

    file = RESULTS / "mutations.json"
    earlier = json.loads(file.read_text())["runs"] if file.exists() else []
    save({"runs": [*earlier, provenance() | result]}, file)


if __name__ == "__main__":
    main()
