"""Which quantized folders vLLM can hold: those whose layers alone are Paley's, as all around them is vLLM's own."""

from __future__ import annotations

from paley.arch import FAMILIES, Architecture, family
from paley.core.errors import PaleyError, Setting
from paley.format.config import QuantizationConfig

__all__ = ["check_servable"]


def check_servable(spec: QuantizationConfig, model_type: str) -> Architecture:
    """-> the row of the family. Raises PaleyError, in one sentence, for a folder that vLLM cannot hold."""
    if model_type not in FAMILIES:
        raise PaleyError(
            f"vLLM: nothing is known of the layers of {model_type!r} models; use paley serve, or export the folder"
        )
    row = family(model_type)
    if any(linear.experts for linear in row.linears()):
        raise PaleyError("vLLM: Paley's plugin has no stacks of experts; use paley serve, or export the folder")
    if spec.stream is not None:
        raise PaleyError(
            "vLLM: the residual stream of this folder turns between embedding and head, which vLLM's models do not do",
            remedy=("quantize it with ", Setting("rotate", "online")),
        )
    for name, scheme in spec.attentions.items():
        if scheme.keys is not None or scheme.values is not None:
            raise PaleyError(
                f"vLLM: {name} quantizes keys or values, and vLLM keeps a cache of its own",
                remedy=("quantize with ", Setting("keys", "null"), " ", Setting("values", "null")),
            )
    return row
