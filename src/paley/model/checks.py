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
_OLDER_SIZES = {"n_embd", "n_head", "n_layer", "n_positions", "n_heads", "n_layers", "d_model"}  # of GPT-2 and others
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
# Settings that null switches off; others divide by them.
_POSITIVE = re.compile(r"\w*softcap\w*|query_pre_attn_scalar|logits_scaling|sliding_window")
_LAYERS = re.compile(r"(n|num)_(hidden_)?layers?|(num_)?(de|en)coder_layers")
_ROPE = ("rope_", "text_config.rope_")
_RUNS = 256  # that families without a row may have of fewer blocks: some run each several times
_UNBOUNDED = {"time_step_limit"}  # of state-space models, whose configs do say Infinity
# Keys of some families that change what a model computes. Where a family's own config class lacks one, it would be
# passed over in silence.
_TELLING = re.compile(
    r"no_rope_layer(s|_interval)|\w*multipliers?|logits?_scal\w+|\w*softcap\w*|query_pre_attn_scalar|(use_)?qk_norm"
    r"|clip_qkv|scale_(emb|depth)|dim_model_base|mup_\w+|(num|n)_(local_|routed_)?experts|(use_)?alibi|attn_temperature\w*"
    r"|use_parallel_residual|parallel_attn|embedding_scale|residual_scale|cross_attention_layers"
    r"|sliding_window|layer_types|attention_chunk_size"
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
        if path.startswith(_ROPE) and key == "factor" and value <= 0:
            raise PaleyError(f"{file}: {path} must be positive, got {value}")
    for where, part in (("", config), ("text_config.", config.get("text_config"))):
        if part is None:
            continue
        if not isinstance(part, dict):
            raise PaleyError(f"{file}: text_config must be a mapping, got {part!r}")
        own = {"num_experts_per_tok"} if _has_row(config) else set[str]()  # Granite 4 without experts has 0 of 0
        for key in (_SIZES | _OLDER_SIZES | own) & part.keys():
            # A family without a row may have a size for each layer.
            sizes = part[key] if isinstance(part[key], list) and not _has_row(config) else [part[key]]
            if any(size is not None and (type(size) is not int or size < 1) for size in sizes):
                raise PaleyError(f"{file}: {where}{key} must be a positive whole number, got {part[key]!r}")
        for key, value in part.items():
            if _has_row(config) and _POSITIVE.fullmatch(key) and type(value) in (int, float) and value <= 0:
                raise PaleyError(f"{file}: {where}{key} must be positive, got {value}; null switches it off")
        taken, experts = part.get("num_experts_per_tok"), next((part[k] for k in _EXPERTS if part.get(k)), None)
        if isinstance(taken, int) and isinstance(experts, int) and taken > experts:
            raise PaleyError(f"{file}: {where}num_experts_per_tok is {taken}, but there are {experts} experts")
        _check_rope(file, part)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_layers(file: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Raises if the config has more layers than the names of the tensors have numbers: making them takes for ever."""
    numbered = {int(part) for name in names for part in name.split(".") if part.isdecimal() and len(part) < 9}
    for part in (config, config.get("text_config")):
        for key, layers in part.items() if isinstance(part, dict) else ():
            if not _LAYERS.fullmatch(key):
                continue
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
        if key not in known and _TELLING.fullmatch(key) and not (_is_neutral(value) or _looks_back(raw, key, value)):
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


def _looks_back(config: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a window leaves nothing out: it is as long as the context, or switched off."""
    if key == "layer_types":
        return isinstance(value, list) and set(value) <= {"full_attention"}
    context = config.get("max_position_embeddings")
    long = type(value) is type(context) is int and value >= context
    return key in ("sliding_window", "attention_chunk_size") and (long or config.get("use_sliding_window") is False)


def _is_neutral(value: Any) -> bool:
    """Whether a setting changes nothing: a factor of 1, something switched off, or a list of ones."""
    if isinstance(value, list):
        return all(each == 1 for each in value)
    return value is not True and value in (None, 0, 1, "", {})
