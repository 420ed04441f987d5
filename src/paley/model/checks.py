"""What a config.json must not say: checked before transformers, and before any model, is made of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paley.arch import FAMILIES
from paley.core.errors import PaleyError

__all__ = ["check_config", "check_family", "check_layers"]

_SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings",
}  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_RUNS = 256  # that families without a row may have of fewer blocks: some run each several times
_UNBOUNDED = {"time_step_limit"}  # of state-space models, whose configs do say Infinity
# Keys of some families that change what a model computes. Where a family's own config class lacks one, it would be
# passed over in silence.
_TELLING = re.compile(
    r"no_rope_layer(s|_interval)|\w*multipliers?|logits?_scal\w+|\w*softcap\w*|query_pre_attn_scalar|(use_)?qk_norm"
    r"|clip_qkv|scale_(emb|depth)|dim_model_base|mup_\w+|(num|n)_(local_|routed_)?experts|(use_)?alibi|attn_temperature\w*"
    r"|use_parallel_residual|parallel_attn|embedding_scale|residual_scale|cross_attention_layers"
)


def check_config(file: Path, config: dict[str, Any]) -> None:
    """Raises for names that are no text, numbers that are none, sizes that are not positive, two rotary bases."""
    for where, part in (("", config), ("text_config.", config.get("text_config"))):
        names = [part.get("model_type"), *_listed(part.get("architectures"))] if isinstance(part, dict) else []
        for name in names:
            if not isinstance(name, str | None):
                raise PaleyError(
                    f"{file}: {where}model_type and {where}architectures are names, got {name!r}; use the config.json "
                    "these weights came with"
                )
    for path, value in _numbers(config):
        key = path.rpartition(".")[2]
        if isinstance(value, float) and not math.isfinite(value) and not (value > 0 and key in _UNBOUNDED):
            raise PaleyError(f"{file}: {path} is {value}; put a number there")
        if key.endswith(("_eps", "_epsilon", "rope_theta")) and (value < 0 or (value == 0 and "theta" in key)):
            raise PaleyError(f"{file}: {path} must be positive, got {value}")
    for where, part in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(part, dict):
            continue
        for key in _SIZES & part.keys():
            # A family without a row may have a size for each layer.
            sizes = part[key] if isinstance(part[key], list) and not _has_row(config) else [part[key]]
            if any(size is not None and (type(size) is not int or size < 1) for size in sizes):
                raise PaleyError(f"{file}: {where}{key} must be a positive whole number, got {part[key]!r}")
        _check_rope(file, part)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_layers(file: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Raises if the config has more layers than the names of the tensors have numbers: making them takes for ever."""
    numbered = {int(part) for name in names for part in name.split(".") if part.isdecimal() and len(part) < 9}
    for part in (config, config.get("text_config")):
        for key in _LAYERS:
            layers = part.get(key) if isinstance(part, dict) else None
            most = max(1 + max(numbered, default=0), 0 if _has_row(config) else _RUNS)
            if type(layers) is int and layers > most:
                raise PaleyError(
                    f"{file}: {key} is {layers:,}, but the weights have {len(numbered):,} layers; use the config.json "
                    "these weights came with"
                )


def _has_row(config: dict[str, Any]) -> bool:
    kind = config.get("model_type")
    return isinstance(kind, str) and kind in FAMILIES


def check_family(file: Path, raw: dict[str, Any], config: Any) -> None:
    """Raises if config.json is another family's with an edited model_type: it would compute something else."""
    families: dict[str, set[str]] = {}
    for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for each in (name,) if isinstance(name, str) else name:
            families.setdefault(each, set()).add(kind)
    for name in raw.get("architectures") or ():
        if raw.get("model_type") not in families.get(name, {raw.get("model_type")}):
            raise PaleyError(
                f"{file}: model_type is {raw.get('model_type')!r}, but the architecture {name}, which is another "
                "family's; put the model_type back that these weights came with"
            )
    known = {*type(config)().to_dict(), *config.attribute_map}
    for key, value in raw.items():
        if key not in known and _TELLING.fullmatch(key) and not _is_neutral(value):
            raise PaleyError(
                f"{file}: {key} is {value!r}, which a {config.model_type} model has no use for: it would compute "
                f"something else than these weights were trained for; correct model_type, or remove {key}"
            )


def _check_rope(file: Path, config: dict[str, Any]) -> None:
    """Raises where the old key and the new one give the rotary base two values: readers take one or the other."""
    old, new = config.get("rope_theta"), config.get("rope_parameters")
    if not isinstance(new, dict) or old is None:
        return
    bases = [part["rope_theta"] for part in (new, *new.values()) if isinstance(part, dict) and "rope_theta" in part]
    if bases and old not in bases:
        raise PaleyError(
            f"{file}: rope_theta is {old}, but {bases[0]} in rope_parameters, and readers take one or the other; "
            "make both the one that these weights were trained with"
        )


def _numbers(value: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """(path, number) of every number, at every depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, path)
    elif type(value) in (int, float):
        yield path, value


def _is_neutral(value: Any) -> bool:
    """Whether a setting changes nothing: a factor of 1, something switched off, or a list of ones."""
    if isinstance(value, list):
        return all(each == 1 for each in value)
    return value is not True and value in (None, 0, 1, "", {})
