"""The three sets of token blocks of a run: calibration, search, test, never the same text twice."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from pydantic import BaseModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paley.core.defaults import SELF
from paley.core.errors import PaleyError, Setting
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme
from paley.data import Role, TokenBlocks, blocks_from_ids, check_disjoint, token_blocks
from paley.eval.sampling import sample_documents
from paley.format.checkpoint import read_tensors
from paley.format.writer import write_tensors
from paley.model.loading import Source, check_seq_len, context_of
from paley.pipeline.monitor import Monitor
from paley.pipeline.run_directory import RunDirectory
from paley.recipe import Recipe

__all__ = ["SELF", "Texts", "calibrates", "check_vocabulary", "fit_lengths", "gather", "is_tuned_on", "test_blocks"]


@dataclass(frozen=True)
class Texts:
    """None where the recipe needs none. tuning: of the calibration's source, but other sequences."""

    calibration: TokenBlocks | None
    search: TokenBlocks | None
    test: TokenBlocks | None
    tuning: TokenBlocks | None = None

    def all(self) -> list[TokenBlocks]:
        return [blocks for blocks in (self.calibration, self.tuning, self.search, self.test) if blocks is not None]

    @property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each text by what it serves."""
        named = {blocks.role: blocks for blocks in (self.calibration, self.search, self.test) if blocks is not None}
        named |= {} if self.tuning is None else {"tuning": self.tuning}
        return {name: blocks.sha256 for name, blocks in named.items()}


def gather(
    recipe: Recipe, source: Source, device: str = "cpu", monitor: Monitor | None = None, run: RunDirectory | None = None
) -> Texts:
    """Cuts the recipe's sources into blocks; a source with one role is used whole, else split by role.

    Without a test the default source keeps its test part: the codes are those of a run that scores on that part. The
    source `self` is text that the model writes itself, which no score may be reported on; `run` keeps it.
    """
    tuning = _tuning_sources(recipe)
    if not tuning and recipe.test is None:
        return Texts(None, None, None)
    tokenizer = source.tokenizer()
    test = test_blocks(recipe, tokenizer) if recipe.test is not None else None
    settings = {"calibration": recipe.calibration, "search": recipe.search}
    tested = test.source if test is not None else recipe.calibration.source
    identities = [_identity(text) for text in (tested, *tuning.values())]

    def blocks(role: Role, more: int = 0) -> TokenBlocks | None:
        """more: sequences beyond those that the role's own settings want."""
        if role not in tuning:
            return None
        count = settings[role].sequences + more
        if tuning[role] == SELF:
            file = None if run is None else run.path / f"text-{role}.safetensors"
            if file is None or not file.exists():
                (monitor or Monitor()).stage(f"sampling the {role} text", 1)
                ids = _sampled(role, count, settings[role].seq_len, source, tokenizer, recipe.seed, device)
                if file is None:
                    return blocks_from_ids(ids, role, SELF)
                write_tensors(file, {"ids": ids})
            return blocks_from_ids(read_tensors(file)["ids"], role, SELF)
        alone = identities.count(_identity(tuning[role])) == 1
        return token_blocks(
            tuning[role], tokenizer, role=role, count=count, seq_len=settings[role].seq_len, seed=recipe.seed,
            whole=alone,
        )  # fmt: skip

    calibration, tuned = _apart(recipe, blocks)
    texts = Texts(calibration, blocks("search"), test, tuned)
    check_disjoint(*texts.all())
    for each in texts.all():
        check_vocabulary(each.ids, source.sites.embedding.shape[0], each.source)
    return texts


def _apart(recipe: Recipe, blocks: Callable[..., TokenBlocks | None]) -> tuple[TokenBlocks | None, TokenBlocks | None]:
    """The text that weights are calibrated on, the same with and without tuning, and the text to tune on."""
    if recipe.tune is None:
        return blocks("calibration"), None
    first = recipe.calibration.sequences if calibrates(recipe) else 0
    try:
        both = blocks("calibration", recipe.tune.sequences + first - recipe.calibration.sequences)
    except PaleyError as error:
        fitting = {part.name: part.value for part in error.remedy if isinstance(part, Setting)}
        if (left := (fitting.get("calibration.sequences") or 0) - first) <= 0:
            raise
        raise PaleyError(
            *error.problem, where=error.where, got=error.got,
            remedy=("use ", Setting("tune.sequences", left), ", or a longer text"),
        ) from None  # fmt: skip
    assert both is not None
    parts = both.ids.split([first, recipe.tune.sequences])
    own, tuning = (blocks_from_ids(ids, both.role, both.source) if len(ids) else None for ids in parts)
    return own, tuning


def fit_lengths(recipe: Recipe, source: Source, monitor: Monitor, *, measures: bool) -> Recipe:
    """The recipe with no sequences longer than the model reads, if their length is the default; measures: also slopes'.

    Raises for a length that was given and is beyond that.
    """
    limit = context_of(source.config) or math.inf
    roles = (*_tuning_sources(recipe), "test", *(("budget",) if measures else ()))
    parts = {role: part for role in roles if (part := getattr(recipe, role)) is not None}
    shorter = {r: p for r, p in parts.items() if p.seq_len > limit and p.seq_len == _default_length(p)}
    if shorter:
        monitor.note(f"sequences of {limit} tokens ({', '.join(shorter)}), as this model reads no more")
        fitted = {role: part.model_copy(update={"seq_len": limit}) for role, part in shorter.items()}
        recipe, parts = recipe.model_copy(update=fitted), parts | fitted
    check_seq_len(source.config, {f"{role}.seq_len": part.seq_len for role, part in parts.items()})
    return recipe


def _default_length(part: BaseModel) -> int:
    return type(part).model_fields["seq_len"].default


def check_vocabulary(ids: Tensor, vocabulary: int, where: str) -> None:
    """Raises for token ids that the model has no embedding of."""
    if ids.numel() and int(ids.max()) >= vocabulary:
        raise PaleyError(
            f"{where}: the tokenizer made token {int(ids.max())}, but the model's vocabulary has {vocabulary} tokens; "
            "use the tokenizer that belongs to the model"
        )


def test_blocks(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
    """The text that a model made by `recipe` is scored on: the test part, or all of a source given for tests alone.

    Recipes that name the same sources are scored on the same text, whatever they tune.
    """
    test = recipe.test
    if test is None:
        raise PaleyError(
            "this recipe has no test text (test: null)", remedy=("give a text to score on: ", Setting("test.source"))
        )
    source = test.source or recipe.calibration.source
    if source == SELF:
        raise PaleyError(
            "a score on text that the model wrote itself says little",
            remedy=("set ", Setting("test.source"), " to a file or pydoc"),
        )
    return token_blocks(
        source, tokenizer, role="test", count=test.sequences, seq_len=test.seq_len, seed=None,
        whole=_identity(source) not in map(_identity, filter(None, _named_sources(recipe))),
    )  # fmt: skip


def is_tuned_on(recipe: Recipe, source: str) -> bool:
    """Whether `recipe` calibrates or searches on `source`, by whatever name of the file."""
    slopes = [] if recipe.budget is None else [recipe.budget.source]
    return _identity(source) in map(_identity, [*_tuning_sources(recipe).values(), *slopes])


def _named_sources(recipe: Recipe) -> list[str | None]:
    """What the recipe tunes on, or would with other methods."""
    slopes = None if recipe.budget is None else recipe.budget.source
    return [recipe.calibration.source, recipe.search.source, slopes]


def calibrates(recipe: Recipe) -> bool:
    """Whether the recipe calibrates on text: weights, mean keys, or a search's draft. Tuning has text of its own."""
    weights = [recipe.weights, recipe.head, *(o.weight for o in recipe.overrides)]
    outliers = max(recipe.outliers, *(o.outliers for o in recipe.overrides), 0)
    wanting = any(scheme is not None and (scheme.needs_data or outliers > 0) for scheme in weights)
    centers = any(AttentionScheme(keys, center_keys=recipe.center_keys).needs_data for keys in _keys(recipe))
    # Overrides may meet in one layer: any weight with any input.
    pairs = product(
        {recipe.weights, *(o.weight for o in recipe.overrides)}, {recipe.inputs, *(o.input for o in recipe.overrides)}
    )
    balances = any(recipe.wants_diagonal(LinearScheme(*pair)) for pair in pairs)
    return recipe.search.method != "none" or wanting or centers or balances


def _keys(recipe: Recipe) -> list[ActivationScheme | None]:
    return [recipe.keys, *(override.keys for override in recipe.overrides)]


def _tuning_sources(recipe: Recipe) -> dict[Role, str]:
    """Role -> source, of the roles calibration and search as far as the recipe needs them."""
    sources: dict[Role, str] = {}
    if calibrates(recipe) or recipe.tune is not None:
        sources["calibration"] = recipe.calibration.source
    if recipe.search.method != "none":
        sources["search"] = recipe.search.source or recipe.calibration.source
    return sources


def _sampled(
    role: Role, count: int, seq_len: int, source: Source, tokenizer: PreTrainedTokenizerBase, seed: int, device: str
) -> Tensor:
    """ids [sequences, seq_len] that the model writes, in its own type where that is multiplied fast."""
    # Far apart, so that calibration and search never share a text's seed.
    seed += {"calibration": 0, "search": 1_000_000}[role]
    fast = device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    own = getattr(source.config, "dtype", None)
    dtype = torch.bfloat16 if fast and own == torch.bfloat16 else torch.float32
    model = source.load(dtype, device)
    return sample_documents(model, tokenizer, count=count, tokens=seq_len, seed=seed)


def _identity(source: str) -> str:
    """Two names of one file are one source."""
    path = Path(source)
    return str(path.resolve()) if path.exists() else source
