"""What some families' configs called their rotary settings, beside `rope_theta` and `partial_rotary_factor`."""

from __future__ import annotations

__all__ = ["OLDER_ROPE_KEYS"]

Keys = dict[str, tuple[str | None, str]]

_NEOX: Keys = {"rotary_emb_base": (None, "rope_theta"), "rotary_pct": (None, "partial_rotary_factor")}

# model_type -> key of the config -> (kind of layer, or None for all; setting in `rope_parameters`).
OLDER_ROPE_KEYS: dict[str, Keys] = {
    "gpt_neox": _NEOX,
    "gpt_neox_japanese": _NEOX,
    "modernbert-decoder": {
        "global_rope_theta": ("full_attention", "rope_theta"),
        "local_rope_theta": ("sliding_attention", "rope_theta"),
    },
}
