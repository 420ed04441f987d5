"""A tokenizer as GGUF's keys: pieces, their kinds, merges or scores, and which regular expression splits text first.

llama.cpp has two tokenizers that Hugging Face's BPE can be: "gpt2" on bytes, with merges and a named way to split text;
and "llama", SentencePiece's, with a score for each piece. One that is neither is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paley.arch.gguf import SPLITS, Token
from paley.core.errors import PaleyError
from paley.model.folders import load_tokenizer

__all__ = ["tokenizer_keys"]


def tokenizer_keys(folder: Path, vocabulary: int) -> dict[str, Any]:
    """The tokenizer of a folder, for a model of so many tokens: key after "tokenizer." -> text, number, bool or a list.

    Errors: PaleyError if llama.cpp has none that does the same, or if there are more pieces than rows of the embedding.
    """
    tokenizer: Any = load_tokenizer(folder)
    if not tokenizer.is_fast:
        raise PaleyError("its tokenizer has no tokenizer.json, which GGUF's keys are made from", where=folder)
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    model = data["model"]
    if model["type"] != "BPE":
        raise PaleyError(
            f"GGUF holds tokenizers of type BPE, got {model['type']}", where=f"{folder}/tokenizer.json",
            remedy="keep the folder as it is, or export it --to plain",
        )  # fmt: skip
    pieces, kinds = _pieces(data, vocabulary, folder)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    keys: dict[str, Any] = {"ggml.tokens": pieces, "ggml.token_type": kinds}
    if model["byte_fallback"]:
        keys = {"ggml.model": "llama", "ggml.pre": "default"} | keys
        keys["ggml.scores"] = _scores(pieces, model["merges"])
        keys["ggml.add_space_prefix"] = _prepends(data)
    else:
        keys = {"ggml.model": "gpt2", "ggml.pre": _name_of_split(data, folder)} | keys | {"ggml.merges": merges}
    return keys | _specials(tokenizer)


def _pieces(data: dict[str, Any], vocabulary: int, folder: Path) -> tuple[list[str], list[int]]:
    """Pieces and kinds by id; ids that no piece has are unused ones."""
    model, added = data["model"], data["added_tokens"]
    named = {index: piece for piece, index in model["vocab"].items()}
    named |= {token["id"]: token["content"] for token in added}
    if (most := max(named, default=-1)) >= vocabulary:
        raise PaleyError(
            f"its tokenizer has a piece of id {most}, but the embedding has {vocabulary} rows", where=folder,
            remedy="take the tokenizer that the model was trained with",
        )  # fmt: skip
    kinds = {token["id"]: Token.CONTROL if token["special"] else Token.USER_DEFINED for token in added}
    if model["byte_fallback"]:
        kinds = {index: Token.BYTE for index, piece in named.items() if _is_byte(piece)} | kinds
        if (unknown := model["vocab"].get(model["unk_token"])) is not None:
            kinds[unknown] = Token.UNKNOWN
    return (
        [named.get(index, f"[PAD{index}]") for index in range(vocabulary)],
        [int(kinds.get(index, Token.NORMAL) if index in named else Token.UNUSED) for index in range(vocabulary)],
    )


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _scores(pieces: list[str], merges: list[Any]) -> list[float]:
    """SentencePiece joins the two neighbours whose piece has the highest score; here the earliest merge has it.

    Merges of a converted SentencePiece model are in the order of the pieces that they make.
    """
    first: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault(left + right, rank)
    return [-float(first.get(piece, len(merges))) for piece in pieces]


def _steps(step: dict[str, Any] | None, inner: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence of them."""
    if step is not None and step["type"] == "Sequence":
        yield from step[inner]
    elif step is not None:
        yield step


def _prepends(data: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    if any(step["type"] == "Prepend" for step in _steps(data["normalizer"], "normalizers")):
        return True
    steps = [step for step in _steps(data["pre_tokenizer"], "pretokenizers") if step["type"] == "Metaspace"]
    return any(step.get("prepend_scheme", "always") != "never" for step in steps)


def _name_of_split(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of how this tokenizer splits text."""
    found = [
        {key: value for key, value in step.items() if key != "trim_offsets"}
        for step in _steps(data["pre_tokenizer"], "pretokenizers")
    ]
    for name, steps in SPLITS.items():
        if found == steps:
            return name
    raise PaleyError(
        f"its tokenizer splits text in a way that Paley has no name of llama.cpp for; known are {', '.join(SPLITS)}",
        where=f"{folder}/tokenizer.json: pre_tokenizer", remedy="export it --to plain, and use llama.cpp's converter",
    )  # fmt: skip


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of special tokens, whether they are added to a text, and the chat template."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask"}
    found = {theirs: getattr(tokenizer, f"{ours}_token_id") for ours, theirs in names.items()}
    keys: dict[str, Any] = {f"ggml.{name}_token_id": i for name, i in found.items() if i is not None}
    ids = tokenizer("a")["input_ids"]
    assert isinstance(ids, list)
    keys["ggml.add_bos_token"] = bool(ids) and ids[0] == found["bos"] is not None
    keys["ggml.add_eos_token"] = bool(ids) and ids[-1] == found["eos"] is not None
    if isinstance(template := tokenizer.chat_template, str):
        keys["chat_template"] = template
    return keys
