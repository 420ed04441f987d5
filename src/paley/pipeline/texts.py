"""The three sets of token blocks of a run: calibration, search, test, never the same text twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from paley.core.errors import PaleyError
from paley.data import Role, TokenBlocks, blocks_from_ids, check_disjoint, token_blocks
from paley.eval.sampling import sample_documents
from paley.model.loading import Source
from paley.recipe import Recipe

__all__ = ["SELF", "Texts", "gather"]

SELF = "self"


@dataclass(frozen=True)
class Texts:
    """calibration and search are None where the recipe needs none."""

    calibration: TokenBlocks | None
    search: TokenBlocks | None
    test: TokenBlocks


def gather(recipe: Recipe, source: Source, device: str = "cpu") -> Texts:
    """Cuts the recipe's sources into blocks; a source with one role is used whole, else split by role.

    The source `self` is text that the model writes itself, which no score may be reported on.
    """
    tokenizer = source.tokenizer()
    sources: dict[Role, str] = {"test": recipe.test.source or recipe.calibration.source}
    if sources["test"] == SELF:
        raise PaleyError("a score on text that the model wrote itself says little: set test.source to a file or pydoc")
    needs_search = recipe.search.method != "none"
    calibrates = recipe.weights is not None and recipe.weights.method == "gptq"
    if needs_search or calibrates or (recipe.keys is not None and recipe.center_keys):
        sources["calibration"] = recipe.calibration.source
    if needs_search:
        sources["search"] = recipe.search.source or recipe.calibration.source
    settings = {"calibration": recipe.calibration, "search": recipe.search, "test": recipe.test}
    identities = {role: _identity(source) for role, source in sources.items()}

    def blocks(role: Role) -> TokenBlocks | None:
        if role not in sources:
            return None
        if sources[role] == SELF:
            return _sampled(role, settings[role], source, tokenizer, recipe.seed, device)
        alone = list(identities.values()).count(identities[role]) == 1
        return token_blocks(
            sources[role], tokenizer, role=role, count=settings[role].sequences, seq_len=settings[role].seq_len,
            seed=None if role == "test" else recipe.seed, whole=alone,
        )  # fmt: skip

    test = blocks("test")
    assert test is not None
    texts = Texts(blocks("calibration"), blocks("search"), test)
    check_disjoint(*(b for b in (texts.calibration, texts.search, texts.test) if b is not None))
    return texts


def _sampled(
    role: Role, settings: Any, source: Source, tokenizer: PreTrainedTokenizerBase, seed: int, device: str
) -> TokenBlocks:
    # Far apart, so that calibration and search never share a text's seed.
    seed += {"calibration": 0, "search": 1_000_000}[role]
    ids = sample_documents(
        source.load(device=device), tokenizer, count=settings.sequences, tokens=settings.seq_len, seed=seed
    )
    return blocks_from_ids(ids, role, SELF)


def _identity(source: str) -> str:
    """Two names of one file are one source."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
