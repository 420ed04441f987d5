"""A problem: a checked model with everything resolved that a recipe asks of it. It is made once in a run.

Budgets, searches, sensitivities, execution and accounting take the problem; none of them sees a recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from paley.arch import Site, Sites
from paley.core.errors import PaleyError, Setting
from paley.core.rounding import check_groups
from paley.core.schemes import LinearScheme, Rotation, Schemes
from paley.core.transforms import Transform
from paley.format import spec
from paley.format.header import TensorInfo
from paley.methods.diagonal import TOKENS
from paley.model.loading import Source
from paley.recipe.models import Budget, Search

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    """source: the model. schemes: what is done at each of its sites; rotation: what is folded before.

    dtype: of tensors that stay unquantized. wanted: the weights that the recipe quantizes, whatever a budget decides.
    settled: (module, field) pairs that an override of the recipe set, which no budget changes.
    carried: tensors that no module of the model reads, and that are stored unchanged. compensate, share: as
    `compensate` and `compensate_share` of Recipe.
    fit_remedy: how a group size that fits no layer is put right, for errors.
    """

    source: Source
    schemes: Schemes
    rotation: Rotation | None
    dtype: torch.dtype
    seed: int
    compensate: str
    share: float
    search: Search
    budget: Budget | None = None
    wanted: frozenset[str] = frozenset()
    settled: frozenset[tuple[str, str]] = frozenset()
    notes: tuple[str, ...] = ()
    fit_remedy: str = ""
    carried: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def sites(self) -> Sites:
        return self.source.sites

    @property
    def folded(self) -> bool:
        """Whether the norms' gains go into the weights, and R1 with them."""
        return self.rotation is not None and self.rotation.stream is not None

    @property
    def waiting_dtype(self) -> torch.dtype:
        """In which parts of a calibrated model wait for their turn: the files' own, unless they are folded before."""
        as_float = self.folded or self.sites.architecture.walked
        return torch.float32 if as_float else self.source.checkpoint.float_dtype

    @property
    def is_data_free(self) -> bool:
        """Whether each weight is quantized by itself: nothing is calibrated, folded or averaged over a text."""
        return not self.folded and not self.needs_calibration

    @property
    def needs_calibration(self) -> bool:
        schemes = (*self.schemes.attentions.values(), *self.schemes.linears.values())
        return any(scheme.needs_data for scheme in schemes)

    def sequences_read(self, count: int, seq_len: int) -> int:
        """How many of a calibration text's sequences pass through the blocks for weights: for diagonals alone a few."""
        linears = self.schemes.linears.values()
        if any(scheme.calibrated for scheme in linears):
            return count
        return min(count, -(-TOKENS // seq_len)) if any(scheme.diagonal for scheme in linears) else 0

    @property
    def quantizes(self) -> bool:
        """Whether the model will need Paley to run."""
        linears, attentions = self.schemes.linears.values(), self.schemes.attentions.values()
        return (
            self.stream is not None
            or any(s.weight or s.input or s.transform for s in linears)
            or any(s.keys or s.values for s in attentions)
        )

    @property
    def stream(self) -> Transform | None:
        """The transform of the residual stream that a tied pair leaves to run time; None if there is none."""
        return self.rotation.stream if self.rotation is not None and self.sites.tied else None

    def weights(self) -> Iterable[tuple[Site, LinearScheme]]:
        """Every weight that a file stores once, and its scheme."""
        return ((site, self.schemes.linears[site.name]) for site in self.sites.weights)

    def shape(self, site: Site) -> tuple[int, int]:
        """[out, in] of a weight in the residual stream as it is rotated, before its own transform."""
        stream = self.rotation.stream if self.rotation is not None else None
        return self.sites.shape_in(site, None if stream is None else stream.out_dim)

    def stored_bytes(self, site: Site, scheme: LinearScheme | None = None) -> int:
        """Bytes that a weight takes under its scheme, or another."""
        rows, columns = self.shape(site)
        scheme = scheme or self.schemes.linears[site.name]
        return spec.linear_bytes(site.name, scheme, columns, rows, self.dtype.itemsize)

    def with_schemes(self, schemes: Schemes, **changes: object) -> Self:
        return replace(self, schemes=schemes, **changes)  # type: ignore[arg-type]

    def check_ragged(self) -> None:
        """Raises for a stream whose width the family's config class refuses, and no other class takes."""
        row, config = self.sites.architecture, self.source.config
        stream = self.rotation.stream if self.rotation is not None else None
        if not row.ragged or stream is None or stream.out_dim % config.num_attention_heads == 0:
            return
        if biased := [name for name in row.ragged_excludes if getattr(config, name, False)]:
            raise PaleyError(
                f"expand: hidden size {stream.out_dim} is no multiple of {config.num_attention_heads} heads, which a "
                f"{config.model_type} with {biased[0]} cannot be",
                remedy=("choose another ", Setting("expand")),
            )

    def check(self) -> Self:
        """-> self; raises if a scheme does not fit the model: groups that do not divide a width, too many outliers."""
        self.check_ragged()
        for site, scheme in self.weights():
            rows, columns = self.shape(site)
            width = scheme.stored_width(columns)
            if scheme.weight is not None:
                check_groups(width, scheme.weight.group_size, site.name, what="in_features=", way_out=self.fit_remedy)
                scheme.weight.grid.check_width(width, site.name)
            spec.expected_tensors(site.name, scheme, width, rows)
            if scheme.input is not None:
                check_groups(width, scheme.input.group_size, f"{site.name}: input", way_out=self.fit_remedy)
        for site in self.sites.of("keys", "values"):
            scheme = getattr(self.schemes.attentions[site.module], site.kind)
            if scheme is not None:
                check_groups(site.shape[1], scheme.group_size, f"{site.module}: {site.kind}")
        return self

    def inputs(self) -> Mapping[str, Transform]:
        """Path of a linear or untied head -> the transform of what it reads at run time, of those that have one."""
        names = {site.name for site in self.sites.of("linear", "head") if site.stored_as == site.name}
        return {n: s.transform for n, s in self.schemes.linears.items() if n in names and s.transform is not None}
