"""`paley.push`: a quantized folder, with its card, onto the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os.path import isabs
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  of httpx or httpx2, as the version has it
    OfflineModeIsEnabled,
)

from paley.core.errors import PaleyError, Setting
from paley.core.reading import read_json
from paley.format.digests import DIGESTS, Digests
from paley.format.publish import RESULTS
from paley.pipeline.verify import verify

__all__ = ["Pushed", "push"]


@dataclass(frozen=True)
class Pushed:
    """repository: OWNER/NAME; url: of the commit; left_out: files of the folder that Paley did not write."""

    repository: str
    url: str
    files: int
    bytes: int
    left_out: tuple[str, ...] = ()


def push(
    folder: str | Path, repository: str, *, private: bool | None = None, message: str | None = None,
    on_file: Callable[[int, str], None] = lambda total, name: None,
) -> Pushed:  # fmt: skip
    """Verifies a folder that Paley wrote and uploads it in one commit; README.md, its model card, may be edited before.

    repository: OWNER/NAME, or NAME for one's own; it is made if it is not there, private or not (None: as the account
    prefers). on_file: as of `paley.verify`. The token is that of `hf auth login`, or HF_TOKEN.
    Errors: PaleyError for a damaged folder or one that names places on this machine, before anything is sent, and for
    what the Hub refuses.
    """
    verified = verify(folder, on_file=on_file)
    _check_paths(verified.folder)
    files = [*Digests.load(verified.folder).files, DIGESTS]
    if links := [name for name in files if (verified.folder / name).is_symlink()]:
        raise PaleyError(
            f"{verified.folder}: {links[0]} is a link, and what it leads to would be uploaded",
            remedy="put the file itself there",
        )
    api = HfApi(library_name="paley")
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(
            made.repo_id, [CommitOperationAdd(name, verified.folder / name) for name in files],
            commit_message=message or "A model quantized by Paley",
        )  # fmt: skip
    except OfflineModeIsEnabled:
        raise PaleyError(f"{repository}: HF_HUB_OFFLINE is set", remedy="unset it to upload") from None
    except (HTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise PaleyError(
            f"{repository}: cannot be uploaded to ({reason})",
            remedy="give OWNER/NAME, and a token that may write there (`hf auth login`, or HF_TOKEN)",
        ) from error
    return Pushed(made.repo_id, commit.commit_url, len(files), verified.bytes, verified.not_covered)


def _check_paths(folder: Path) -> None:
    """Raises for a text that plan.json or results.json, as an older Paley wrote them, names by its whole path."""
    for name in ("plan.json", RESULTS):
        waiting: list[Any] = [read_json(folder / name)] if (folder / name).is_file() else []
        while waiting:
            value = waiting.pop()
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
            if isinstance(value, dict) and isinstance(source := value.get("source"), str) and isabs(source):
                raise PaleyError(
                    f"{folder / name}: names a text by its place on this machine, {source}",
                    remedy=("quantize again, with ", Setting("base", folder), ", which keeps what it can"),
                )
