"""The rotary settings in a config.json, also under the keys that readers before transformers 5 take them from."""

from __future__ import annotations

from typing import Any

from paley.arch import OLDER_ROPE_KEYS

__all__ = ["with_older_keys"]


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `rope_theta` and the like beside `rope_parameters`, as other readers would take their defaults.

    Settings by the type of a layer, as Gemma 3 has them, become `rope_theta` of full attention and
    `rope_local_base_freq` of the window's. A few families have names of their own beside.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    kinds = {key: value for key, value in rope.items() if isinstance(value, dict)}
    full = kinds.get("full_attention") or next(iter(kinds.values()), rope)
    older = {"rope_theta": full.get("rope_theta"), "partial_rotary_factor": full.get("partial_rotary_factor")}
    if (local := kinds.get("sliding_attention")) is not None:
        older["rope_local_base_freq"] = local.get("rope_theta")
    scaling = {key: value for key, value in full.items() if key not in older}
    if scaling.get("rope_type", "default") != "default" and not kinds:
        older["rope_scaling"] = scaling | {"type": scaling["rope_type"]}
    for key, (kind, setting) in OLDER_ROPE_KEYS.get(str(config.get("model_type")), {}).items():
        older[key] = (rope if kind is None else kinds.get(kind, {})).get(setting)
    return config | {key: value for key, value in older.items() if value is not None}
