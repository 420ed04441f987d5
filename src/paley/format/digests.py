"""digests.json: what belongs together, and how to tell that a folder still holds it.

It has a sha256 of each file, which `paley verify` compares, and quicker checksums of each tensor and of each key of the
config, which are compared whenever the model is loaded. config.json names the digest of those (`digest_of`), so that
neither file passes with another folder's.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from paley.core.errors import PaleyError
from paley.core.reading import read_json
from paley.format.checkpoint import VOLATILE, Checkpoint
from paley.format.files import all_files, write_json
from paley.format.header import NAMES, TensorInfo, as_bytes

__all__ = ["DIGESTS", "Digests", "FileDigest", "check", "seal", "seal_model", "sha256"]

DIGESTS = "digests.json"
CONFIG, SECTION, DIGEST = "config.json", "quantization_config", "digest"
# Tokens that end a text, and whether there is a cache, are settings of generation: they may be edited.
_FREE = VOLATILE | {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
_LARGEST = 2**30  # bytes of digests.json
_AGAIN = "copy or download the folder again"


def _inside(path: str) -> str:
    """-> path; ValueError if it leads out of the folder."""
    if path.startswith("/") or not {"..", ""}.isdisjoint(path.split("/")) or "\\" in path:
        raise ValueError("leads out of the folder")
    return path


Crc = Annotated[int, Field(ge=0, lt=2**32)]


class FileDigest(BaseModel):
    """Size and sha256 of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bytes: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Digests(BaseModel):
    """files: by path from the folder, "/" between its parts. tensors, config: CRC-32 of each tensor and each key."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    files: dict[Annotated[str, AfterValidator(_inside)], FileDigest] = {}
    tensors: dict[str, Crc]
    config: dict[str, Crc]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """digests.json of the folder; PaleyError if it is missing or damaged."""
        file = folder / DIGESTS
        if not file.is_file():
            raise PaleyError(f"{file}: is missing, so nothing here can be checked; {_AGAIN}")
        if file.stat().st_size > _LARGEST:
            raise PaleyError(f"{file}: is damaged: it is larger than any that Paley writes; {_AGAIN}")
        try:
            return cls.model_validate_json(json.dumps(read_json(file)), strict=True)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise PaleyError(f"{file}: is damaged at {where!r}; {_AGAIN}") from None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Self:
        """Of tensors and config as they are."""
        tensors = dict(zip(checkpoint.infos, _checksums(checkpoint.infos.items()), strict=True))
        return cls(tensors=tensors, config=config_checksums(checkpoint.config))

    @property
    def digest(self) -> str:
        """sha256 of all checksums of tensors and config: the name of what belongs together."""
        return hashlib.sha256(_canonical([self.tensors, self.config])).hexdigest()

    def check_config(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Raises if the config is not the one that was written: another digest, or the first key that differs."""
        named = _section(config).get(DIGEST)
        if named is not None and named != self.digest:
            raise PaleyError(f"{folder / DIGESTS}: does not belong to this config.json, or is damaged; {_AGAIN}")
        if changed := differing(self.config, config_checksums(config)):
            raise PaleyError(
                f"{folder / CONFIG}: {_listed(changed)} not as written; put it back, or quantize the model again"
            )

    def check_tensors(self, folder: Path, infos: Mapping[str, TensorInfo]) -> None:
        """Raises if the tensors are not those that were written; reads every byte once."""
        if changed := differing(self.tensors, dict(zip(infos, _checksums(infos.items()), strict=True))):
            found = infos.get(changed[0])
            place = folder if found is None else found.file
            raise PaleyError(f"{place}: {_listed(changed)} not as written: the file is damaged; {_AGAIN}")


def check(checkpoint: Checkpoint) -> bool:
    """Whether the folder has digests; raises unless config and tensors are then as they were written."""
    folder = checkpoint.folder
    if DIGEST not in _section(checkpoint.config) and not (folder / DIGESTS).exists():
        return False
    digests = Digests.load(folder)
    digests.check_config(folder, checkpoint.config)
    digests.check_tensors(folder, checkpoint.infos)
    return True


def seal_model(folder: Path) -> None:
    """Writes digests.json without files, and its digest into the quantization_config of config.json if there is one."""
    checkpoint = Checkpoint.open(folder)
    digests = Digests.of(checkpoint)
    if section := _section(checkpoint.config):
        config = checkpoint.config | {SECTION: section | {DIGEST: digests.digest}}
        write_json(folder / CONFIG, config)
    write_json(folder / DIGESTS, digests.model_dump())


def seal(folder: Path) -> None:
    """Adds every file of the finished folder to its digests.json."""
    digests = Digests.load(folder)
    paths = [path for path in all_files(folder) if path != DIGESTS]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda path: sha256(folder / path), paths))
    files = {
        path: FileDigest(bytes=(folder / path).stat().st_size, sha256=found)
        for path, found in zip(paths, hashes, strict=True)
    }
    write_json(folder / DIGESTS, digests.model_copy(update={"files": files}).model_dump())


def sha256(file: Path) -> str:
    """sha256 of a file, in hex."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise PaleyError(f"{file}: cannot be read: {error.strerror or error}") from error


def _checksum(name: str, info: TensorInfo) -> int:
    """CRC-32 of a tensor: of its name, type and shape, and then its bytes."""
    head = _canonical([name, NAMES[info.dtype], list(info.shape)])
    return zlib.crc32(as_bytes(info.read()), zlib.crc32(head))


def config_checksums(config: Mapping[str, Any]) -> dict[str, int]:
    """CRC-32 of each key's value, where it matters to what the model computes; each layer's own in its section."""
    found = {}
    for path, value in _leaves(config):
        found[path] = zlib.crc32(_canonical(value))
    return found


def differing(written: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """Names whose checksums differ, or that only one of the two has, sorted."""
    return sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))


def _checksums(infos: Iterable[tuple[str, TensorInfo]]) -> Iterator[int]:
    """Of the tensors in this order, few of them in memory at a time."""
    for name, info in infos:
        yield _checksum(name, info)


def _leaves(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(path, value) of the config's keys; maps of the section are opened, as they name layers."""
    for key, value in config.items():
        if key != SECTION or not isinstance(value, dict):
            if key not in _FREE:
                yield key, value
            continue
        for inner, part in value.items():
            if inner != DIGEST and isinstance(part, dict):
                yield f"{key}.{inner}", sorted(part)
                yield from ((f"{key}.{inner}.{name}", entry) for name, entry in part.items())
            elif inner != DIGEST:
                yield f"{key}.{inner}", part


def _section(config: Mapping[str, Any]) -> dict[str, Any]:
    section = config.get(SECTION)
    return section if isinstance(section, dict) else {}


def _canonical(obj: Any) -> bytes:
    return json.dumps(obj, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _listed(names: list[str]) -> str:
    """'a is', or 'a and 3 more are'."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
