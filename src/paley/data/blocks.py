"""Blocks of token ids. Each set has one role, so that no score is measured on text used for tuning."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast, get_args

import torch
from torch import Tensor

from paley.core.errors import PaleyError, Setting, renaming
from paley.data.texts import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Role", "TokenBlocks", "blocks_from_ids", "check_disjoint", "require", "role_part", "token_blocks"]

Role = Literal["calibration", "search", "test"]
ROLES: tuple[Role, ...] = get_args(Role)
SHARES: dict[Role, float] = {"calibration": 0.70, "search": 0.15, "test": 0.15}


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """ids int64 [blocks, seq_len] on the CPU; sha256 of their shape and values; see `blocks_from_ids`."""

    ids: Tensor
    role: Role
    source: str
    sha256: str

    def __post_init__(self) -> None:
        _check_role(self.role)
        if self.ids.ndim != 2 or self.ids.dtype != torch.int64 or self.ids.numel() == 0:
            raise PaleyError(
                f"{self.source}: token ids must be int64 [blocks, seq_len] and not empty, "
                f"got {self.ids.dtype} {list(self.ids.shape)}"
            )
        if (actual := _sha256(self.ids)) != self.sha256:
            raise PaleyError(f"{self.source}: token ids have sha256 {actual}, expected {self.sha256}")


def _sha256(ids: Tensor) -> str:
    header = ",".join(map(str, ids.shape)).encode() + b"\n"
    return hashlib.sha256(header + ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise PaleyError(f"unknown role {role!r} of a text: known are {', '.join(ROLES)}")


def blocks_from_ids(ids: Tensor, role: Role, source: str) -> TokenBlocks:
    """Integer ids [blocks, seq_len], on any device, -> blocks with a copy of them."""
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
        raise PaleyError(f"{source}: token ids must be integers, got {ids.dtype}")
    ids = ids.detach().to(device="cpu", dtype=torch.int64, copy=True).contiguous()
    return TokenBlocks(ids, role, source, _sha256(ids))


def require(blocks: TokenBlocks, role: Role) -> TokenBlocks:
    """Returns the blocks; raises if they have another role (a reported score needs role test)."""
    _check_role(role)
    if blocks.role != role:
        raise PaleyError(
            f"{blocks.source}: these blocks have role {blocks.role!r}, this needs role {role!r}; "
            f"make them with token_blocks(..., role={role!r})"
        )
    return blocks


def check_disjoint(*blocks: TokenBlocks) -> None:
    """Raises if two sets of different roles share a block (after cutting both to the shorter length)."""
    for i, first in enumerate(blocks):
        for second in blocks[i + 1 :]:
            if first.role == second.role:
                continue
            length = min(first.ids.shape[1], second.ids.shape[1])
            rows = {tuple(row) for row in first.ids[:, :length].tolist()}
            shared = sum(tuple(row) in rows for row in second.ids[:, :length].tolist())
            if shared:
                raise PaleyError(
                    f"{shared} of {len(second.ids)} {second.role} blocks ({second.source}) are also among "
                    f"the {first.role} blocks ({first.source}); use different texts, or one source for both "
                    "roles, which is then split"
                )


def role_part(texts: list[str], role: Role) -> list[str]:
    """The documents of `role`: contiguous parts with 70, 15 and 15% of the characters; no document is cut."""
    _check_role(role)
    low = sum(SHARES[r] for r in ROLES[: ROLES.index(role)])
    high = low + SHARES[role] if role != ROLES[-1] else 1.0
    total = sum(map(len, texts))
    part, at = [], 0
    for text in texts:
        middle = (at + len(text) / 2) / total
        at += len(text)
        if low <= middle < high:
            part.append(text)
    return part


def fill_blocks(texts: Iterable[list[int]], seq_len: int, bos: int | None) -> Iterator[list[int]]:
    """Ids of documents -> blocks of seq_len ids; the last may be shorter. Each document and block begins with bos."""
    block: list[int] = []
    for ids in texts:
        at = 0
        while at < len(ids):
            if bos is not None:  # a piece begins a document or a block
                block.append(bos)
            piece = ids[at : at + seq_len - len(block)]
            block += piece
            at += len(piece)
            if len(block) == seq_len:
                yield block
                block = []
    if block:
        yield block


def token_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    role: Role,
    count: int,
    seq_len: int,
    seed: int | None = 0,
    whole: bool = False,
) -> TokenBlocks:
    """`count` blocks of `seq_len` tokens from the part of `source` for this role (whole: from all of it).

    seed shuffles the documents within the part (None: order of the source); role test always keeps the order.
    Documents are tokenized until the blocks are full. Errors: PaleyError if the text is too short.
    """
    if count < 1 or seq_len < 2:
        raise PaleyError(f"{source}: needs count >= 1 and seq_len >= 2, got count={count}, seq_len={seq_len}")
    _check_role(role)
    with renaming({"source": f"{role}.source"}):
        texts = documents(source)
    part = texts if whole else role_part(texts, role)
    if seed is not None and role != "test":
        part = random.Random(seed).sample(part, len(part))
    bos = cast("int | None", tokenizer.bos_token_id)
    # Without BOS, a blank line separates documents.
    end = "\n\n" if bos is None else ""
    encoded = (tokenizer(text + end, add_special_tokens=False, verbose=False)["input_ids"] for text in part)
    blocks, tokens = [], 0
    for block in fill_blocks(encoded, seq_len, bos):
        tokens += len(block)
        if len(block) == seq_len:
            blocks.append(block)
        if len(blocks) == count:
            return blocks_from_ids(torch.tensor(blocks), role, source)
    share = "" if whole else f"'s {role} part ({SHARES[role]:.0%} of its {len(texts)} documents)"
    fitting = tokens // seq_len
    fewer = ("use shorter sequences (", Setting(f"{role}.seq_len"), ")")
    if fitting:
        fewer = ("use ", Setting(f"{role}.sequences", fitting))
    raise PaleyError(
        f"{source}{share} has {tokens} tokens, and {count} sequences of {seq_len} need {count * seq_len}",
        remedy=(*fewer, ", or a longer text, or one for this role alone (", Setting(f"{role}.source"), ")"),
    )
