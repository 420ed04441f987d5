"""The LoRA layer around a coded linear; importing this needs peft."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear

from paley.core.errors import PaleyError
from paley.model.linear import QuantLinear

__all__ = ["QuantLora"]


class QuantLora(Linear):
    """y = round(T x) Wᵀ + b + s · B A x, with float A [r, in] and B [out, r] beside a `QuantLinear`."""

    @property
    def lora_variants(self) -> dict[Any, None]:
        """None: all of them want the float weight."""
        return {(): None}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: the sum of codes and an adapter has no codes."""
        raise PaleyError(
            "an adapter cannot be merged into codes",
            remedy="keep it beside the model, or merge it into what `paley dequantize` writes, and quantize that",
        )

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        assert isinstance(module, QuantLinear)
        return module.plain_width, module.out_features
