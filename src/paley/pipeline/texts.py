"""The three sets of token blocks of a run: calibration, search, test, never the same text twice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from paley.data import Role, TokenBlocks, check_disjoint, token_blocks
from paley.recipe import Recipe

__all__ = ["Texts", "gather"]


@dataclass(frozen=True)
class Texts:
    """calibration and search are None where the recipe needs none."""

    calibration: TokenBlocks | None
    search: TokenBlocks | None
    test: TokenBlocks


def gather(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Cuts the recipe's sources into blocks; a source with one role is used whole, else split by role."""
    sources: dict[Role, str] = {"test": recipe.test.source or recipe.calibration.source}
    needs_search = recipe.search.method != "none"
    if needs_search or (recipe.weights is not None and recipe.weights.method == "gptq"):
        sources["calibration"] = recipe.calibration.source
    if needs_search:
        sources["search"] = recipe.search.source or recipe.calibration.source
    settings = {"calibration": recipe.calibration, "search": recipe.search, "test": recipe.test}
    identities = {role: _identity(source) for role, source in sources.items()}

    def blocks(role: Role) -> TokenBlocks | None:
        if role not in sources:
            return None
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


def _identity(source: str) -> str:
    """Two names of one file are one source."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
