"""What a GGUF file says of a model: its config as keys, and the order of its queries' and keys' rows.

A file cannot say everything: llama.cpp knows of a family which layers have windows, for example. A model that differs
from what llama.cpp takes for granted is refused here, before any work.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paley.arch import Architecture, Site, Sites, sites, window
from paley.arch import family as family_row
from paley.arch.gguf import FLOATS, GGUF, KEYS, GgufFamily
from paley.arch.rope import llama3_factors
from paley.core.errors import PaleyError

__all__ = ["GgufModel"]

_NEAREST = "keep the folder for Paley, or export it --to plain"


@dataclass(frozen=True)
class GgufModel:
    """One model's family, in Paley and in GGUF, its config, and its places by name."""

    row: Architecture
    sites: Sites
    family: GgufFamily
    config: Any
    where: str

    @classmethod
    def of(cls, config: Any, where: str) -> GgufModel:
        """Errors: PaleyError for a family that Paley writes no GGUF files of, and for what a file cannot say."""
        if (family := GGUF.get(config.model_type)) is None:
            raise PaleyError(
                f"a model of type {config.model_type!r} cannot be a GGUF file; those that can are {', '.join(GGUF)}",
                where=where, remedy=_NEAREST,
            )  # fmt: skip
        row = family_row(config.model_type)
        model = cls(row, sites(row, config), family, config, where)
        model._check()
        return model

    def keys(self) -> dict[str, int | float | bool]:
        """Key after the architecture's name -> value."""
        head_dim = self.row.head_dim(self.config)
        found = {key: getattr(self.config, name) for key, name in {**KEYS, **self.family.keys}.items()}
        found |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
        found |= {"rope.dimension_count": head_dim, "rope.freq_base": float(self._rope["rope_theta"])}
        told = {key: float(v) if key in FLOATS else v for key, v in found.items() if v is not None}
        return told | dict(self.family.always)

    def scaling(self) -> dict[str, str | float | int]:
        """Keys of a linear scaling of RoPE, or of YaRN; none if there is no scaling, or if `rope_factors` says it."""
        rope, kind = self._rope, self._rope.get("rope_type", "default")
        if kind not in ("linear", "yarn"):
            return {}
        found: dict[str, str | float | int] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        if kind == "yarn":
            found["rope.scaling.original_context_length"] = self._first_context
        return found

    def rope_factors(self) -> Tensor | None:
        """What each of the head_dim / 2 frequencies is divided by, float32; None if they are as they are."""
        rope = self._rope
        if rope.get("rope_type", "default") != "llama3":
            return None
        return torch.tensor(llama3_factors(rope, self.row.head_dim(self.config)), dtype=torch.float32)

    def row_order(self, site: Site) -> Tensor | None:
        """Which row of a linear is written at each place of the file; None: as they are."""
        if self.row.rotary_pairs == self.family.pairs:
            return None
        heads = {self.row.queries: "num_attention_heads", self.row.keys: "num_key_value_heads"}.get(site.writes or "")
        if heads is None:
            return None
        rows = torch.arange(site.shape[0]).unflatten(0, (getattr(self.config, heads), 2, -1))
        return rows.transpose(1, 2).flatten()  # value i and its partner i + head_dim / 2 become 2i and 2i + 1

    def stacks(self, site: Site) -> dict[str, Tensor | None]:
        """Name of a stack of experts, in the terms of the table of names -> its rows of the weight; None: all of them.

        A fused stack has the rows of gate and up of one expert after the other; in the file they are two stacks.
        """
        if not site.fused:
            return {site.name: None}
        rows = torch.arange(site.shape[0]).unflatten(0, (site.experts, len(site.fused), -1))
        before = site.name.rpartition(".")[0]
        return {f"{before}.{part}_proj": rows[:, index].flatten() for index, part in enumerate(site.fused)}

    @property
    def _rope(self) -> Mapping[str, Any]:
        """RoPE's settings, of layers that see all tokens."""
        found = self.config.rope_parameters
        return found.get("full_attention", found)

    @property
    def _first_context(self) -> int:
        """Tokens of the context that the model was trained with before YaRN."""
        return int(self._rope.get("original_max_position_embeddings") or self.config.max_position_embeddings)

    def _check(self) -> None:
        config, family = self.config, self.family
        self._wants("sliding_window", [window(config, i) is not None for i in range(config.num_hidden_layers)],
                    [bool((i + 1) % family.windows) for i in range(config.num_hidden_layers)])  # fmt: skip
        every = family.rope_every
        self._wants("no_rope_layers", [self.row.has_rope(config, i) for i in range(config.num_hidden_layers)],
                    [not every or bool((i + 1) % every) for i in range(config.num_hidden_layers)])  # fmt: skip
        kind = self._rope.get("rope_type", "default")
        if kind not in ("default", "linear", "llama3", "yarn"):
            raise self._differs("rope_parameters: rope_type", kind, "default, linear, llama3 or yarn")
        if kind == "yarn":
            self._check_yarn()
        local = config.rope_parameters.get("sliding_attention") or {}
        if family.local_theta is not None:
            self._wants("rope_parameters: sliding_attention", local.get("rope_theta"), family.local_theta)
        if local.get("rope_type", "default") != "default":
            raise self._differs("rope_parameters: sliding_attention", local["rope_type"], "default")
        self._wants("rope_parameters: partial_rotary_factor", self._rope.get("partial_rotary_factor") or 1.0, 1.0)
        self._wants(self.row.activation, getattr(config, self.row.activation) or family.activation, family.activation)
        for name, wanted in family.fixed.items():
            self._wants(name, wanted if (got := getattr(config, name, None)) is None else got, wanted)
        if family.heads_fill:
            self._wants("head_dim", self.row.head_dim(config), config.hidden_size // config.num_attention_heads)
        if "attention.scale" in family.keys:
            return
        usual = self.row.head_dim(config) ** -0.5  # no key tells another one
        self._wants("attention scale", round(self.row.attention_scale(config), 9), round(usual, 9))

    def _check_yarn(self) -> None:
        """llama.cpp has its own values of what no key tells."""
        rope = self._rope
        usual = 0.1 * math.log(rope["factor"]) + 1
        given = {"attention_factor": usual, "beta_fast": 32, "beta_slow": 1, "mscale": None, "mscale_all_dim": None}
        for name, wanted in given.items():
            got = rope.get(name)
            if got is not None and (wanted is None or not math.isclose(got, wanted, rel_tol=1e-6)):
                raise self._differs(f"rope_parameters: {name}", got, "unset" if wanted is None else f"{wanted:g}")
        self._wants("rope_parameters: truncate", rope.get("truncate", True), True)

    def _wants(self, key: str, got: object, wanted: object) -> None:
        if got != wanted:
            raise self._differs(key, got, wanted)

    def _differs(self, key: str, got: object, wanted: object) -> PaleyError:
        return PaleyError(
            f"a GGUF file of this family can only have {key} {_short(wanted)}", where=self.where, got=_short(got),
            remedy=_NEAREST,
        )  # fmt: skip


def _short(value: object) -> str:
    """A list of layers' flags as the numbers of those that are set."""
    if isinstance(value, list):
        return f"in layers {', '.join(str(i) for i, flag in enumerate(value) if flag) or 'none'}"
    return str(value)
