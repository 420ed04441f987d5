"""The section "quantization_config" of a quantized checkpoint's config.json."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from paley.core.errors import PaleyError, nearest_name
from paley.core.plain_grids import with_points, without_points
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.core.trellis import TrellisGrid

__all__ = ["FORMAT_VERSION", "QUANT_METHOD", "QuantizationConfig"]

# 1 had no embedding and no stream, and named the grids of users' files; 2 had no digests; 3 had other trellis codes.
FORMAT_VERSION = 4
_READ = (1, 2, 3, 4)
_TRELLIS = 4  # from which version on
QUANT_METHOD = "paley"


class QuantizationConfig(BaseModel):
    """Keys of the two maps are module names, as in the transformers model; from a file by `from_dict`.

    stream: the rotation of the residual stream at run time, for a model whose head is tied to its embedding.
    digest: what digests.json must have; None in folders that came without. carried: tensors of the original that no
    module of the model reads, and that the files hold unchanged.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    quant_method: Literal["paley"] = QUANT_METHOD
    format_version: Literal[4] = FORMAT_VERSION
    linears: dict[str, LinearScheme]
    attentions: dict[str, AttentionScheme]
    stream: Transform | None = None
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    carried: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: object, where: str = "quantization_config") -> Self:
        """Plain data from a file, its types taken strictly; PaleyError names each key that is wrong."""
        if not isinstance(data, dict):
            raise PaleyError(f"{where}: must be a JSON object, got {type(data).__name__}")
        method, version = data.get("quant_method"), data.get("format_version")
        if method != QUANT_METHOD:
            raise PaleyError(f"{where}: quant_method must be {QUANT_METHOD!r}, got {method!r}")
        if type(version) is not int or version not in _READ:
            raise PaleyError(
                f"{where}: format_version must be {FORMAT_VERSION}, got {version!r}; install the paley that "
                "wrote this checkpoint, or quantize the model again"
            )
        data = with_points(data, where) | {"format_version": FORMAT_VERSION}
        try:
            made = cls.model_validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            reasons = "; ".join(_reason(detail) for detail in error.errors(include_url=False))
            raise PaleyError(f"{where}: {reasons}") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise PaleyError(f"{where}: is not plain JSON data ({error})") from None
        for name, scheme in made.linears.items():
            if version < _TRELLIS and scheme.weight is not None and isinstance(scheme.weight.grid, TrellisGrid):
                raise PaleyError(
                    f"{where}: {name} has trellis codes of format version {version}, which mean other values since "
                    f"{_TRELLIS}; quantize the model again"
                )
        return made

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.json."""
        data = self.model_dump(mode="json")
        for name in ("stream", "digest", "carried"):
            if not data[name]:
                del data[name]
        return without_points(data)


# The classes under (map, module), and under (map, module, place).
_CLASSES: dict[str | int, type] = {
    "linears": LinearScheme, "attentions": AttentionScheme, "transform": Transform, "stream": Transform,
    "weight": WeightScheme, "input": ActivationScheme, "keys": ActivationScheme, "values": ActivationScheme,
}  # fmt: skip


def _reason(detail: ErrorDetails) -> str:
    """A sentence: linears['model.layers.0.mlp.up_proj'].weight.grid: the problem."""
    loc, kind = list(detail["loc"]), detail["type"]
    path = "".join(f"[{part!r}]" if depth == 1 else f".{part}" for depth, part in enumerate(loc))[1:]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = list(QuantizationConfig.model_fields)
        if len(loc) > 1:
            known = [field.name for field in fields(_CLASSES[loc[0] if len(loc) == 3 else loc[2]])]
        return f"{path}: unknown key{nearest_name(str(loc[-1]), known)}; known here: {', '.join(known)}"
    if kind in ("missing", "missing_argument"):
        return f"{path}: is required and missing"
    reason = detail["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{path}: {reason}" if kind == "value_error" else f"{path}: {reason}, got {detail['input']!r}"
