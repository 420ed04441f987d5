"""The small reference models and text of their own domain, from the folder that PALEY_SHARED names.

By default that is the folder `shared` beside the repository. TinyStories files have no separators between
stories: they are split where a story opens, and each story starts a block of its own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from paley.data import TokenBlocks, blocks_from_ids, check_disjoint
from paley.pipeline.texts import Texts

SHARED = Path(os.environ.get("PALEY_SHARED", Path(__file__).resolve().parents[2] / "shared"))
_OPENING = re.compile(r"\n(?=Once upon a time|One day,)")
_SEED = 0


@dataclass(frozen=True)
class Domain:
    """train: files for calibration and search; test: files for scores; stories: each block is one story."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    seq_len: int
    stories: bool


_STORIES = ("tinystories_train_head_ajay.txt",), ("tinystories_eval_yuninxia.txt",)
MODELS = {
    "babyllama-tok361-969k": Domain(*_STORIES, 256, True),
    "ref-llama": Domain(("valid_docs.txt", "valid_books.txt"), ("test_docs.txt", "test_books.txt"), 256, False),
    "stories260k-llama": Domain(*_STORIES, 256, True),
    "tinystories-656k-llama": Domain(*_STORIES, 128, True),
}


def model_folder(name: str) -> Path:
    return SHARED / "models" / name


def texts(name: str, tokenizer: PreTrainedTokenizerBase, *, calibration: int, search: int, test: int) -> Texts:
    """So many sequences of each role, of the model's own domain."""
    domain = MODELS[name]
    train = _blocks(domain, domain.train, tokenizer)
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(_SEED))]
    scored = _blocks(domain, domain.test, tokenizer)
    scored = scored[torch.linspace(0, len(scored) - 1, min(test, len(scored))).long()]
    if calibration + search > len(train):
        raise SystemExit(f"{name}: {len(train)} training blocks, {calibration + search} asked for")
    source = ", ".join(domain.train)
    found = Texts(
        blocks_from_ids(train[:calibration], "calibration", source),
        blocks_from_ids(train[len(train) - search :], "search", source) if search else None,
        blocks_from_ids(scored, "test", ", ".join(domain.test)),
    )
    check_disjoint(*(b for b in (found.calibration, found.search, found.test) if isinstance(b, TokenBlocks)))
    return found


def _blocks(domain: Domain, files: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """All whole blocks [n, seq_len] of the files, each from BOS."""
    body, rows = domain.seq_len - 1, []
    for file in files:
        text = (SHARED / "data" / "text" / file).read_text(encoding="utf-8")
        documents = [re.sub(r"\n+", "\n", s).strip() for s in _OPENING.split(text)] if domain.stories else [text]
        for document in documents:
            ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            starts = [0] if domain.stories else range(0, len(ids), body)
            rows += [[tokenizer.bos_token_id, *ids[s : s + body]] for s in starts if len(ids) >= s + body]
    return torch.tensor(rows)
