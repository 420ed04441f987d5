"""What the engine runs: why a folder is left to transformers, and the model's facts for one that is not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from paley.arch import FAMILIES, Architecture, Sites, rope_follows_length, sites, window
from paley.core.errors import PaleyError
from paley.core.grids import Grid
from paley.core.schemes import ActivationScheme, AttentionScheme
from paley.format.checkpoint import Checkpoint
from paley.format.spec import QuantizationConfig, quantization_of
from paley.kernels import native
from paley.runtime.native import ACTIVATIONS
from paley.runtime.rope import KINDS, rope_of, rope_settings

__all__ = ["CHECKED", "Facts", "facts_of", "why_not"]

# Families whose logits the tests compare with those of transformers. A row alone is not enough: a family may do what
# no row tells.
CHECKED = (
    "gemma", "gemma2", "gemma3_text", "glm", "glm4", "granite", "llama", "ministral", "mistral", "olmo2", "olmo3",
    "phi3", "qwen2", "qwen3", "smollm3",
)  # fmt: skip
_NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip
_COUNTS = _NEEDED[:6]
_WINDOWS = ("ministral", "mistral", "phi3")  # families whose window needs no layer_types
_NO_BIAS = ("ministral", "mistral", "phi3")  # families without any, whatever their config says
_HALF = ("glm", "glm4")  # families that turn half a head unless told otherwise
_GROUP = 64  # MAX_ROWS of csrc/steps.h
_PARTIAL = ("glm", "glm4", "phi3")  # families whose default RoPE turns a part of a head


@dataclass(frozen=True)
class Facts:
    """A quantized folder, described. config: the keys of config.json as attributes."""

    checkpoint: Checkpoint
    config: Any
    row: Architecture
    sites: Sites
    spec: QuantizationConfig

    @property
    def head_dim(self) -> int:
        return self.row.head_dim(self.config)

    @property
    def limit(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def activation(self) -> str:
        return _activation(self.row, self.config)

    def number(self, name: str, default: float) -> float:
        """The config's value of a row's attribute, such as `residual_multiplier`; default if it has none."""
        return float(self.row.number(self.config, name, default))

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        return float(self.row.attention_scale(self.config))

    def window(self, block: int) -> int | None:
        return window(self.config, block)

    def layer_type(self, block: int) -> str | None:
        kinds = getattr(self.config, "layer_types", None)
        return kinds[block] if kinds else None


def why_not(folder: str | Path) -> str | None:
    """Why the engine does not run the quantized model in `folder`, in a few words; None if it does.

    Errors: PaleyError for a folder that is damaged, or not Paley's.
    """
    if (reason := native.why_missing()) is not None:
        return reason
    return facts_of(Path(folder))[1]


def facts_of(folder: Path) -> tuple[Facts | None, str | None]:
    """-> the facts of a folder that the engine runs, or why it does not."""
    checkpoint = Checkpoint.open(folder)
    spec = quantization_of(checkpoint)
    config = SimpleNamespace(**checkpoint.config)
    if (reason := _why_not_config(config)) is not None:
        return None, reason
    row = FAMILIES[config.model_type]
    facts = Facts(checkpoint, config, row, sites(row, config), spec)
    reason = _why_not_schemes(facts) or _why_not_biases(facts)
    return (None, reason) if reason is not None else (facts, None)


def _why_not_config(config: Any) -> str | None:
    kind = getattr(config, "model_type", None)
    if kind not in CHECKED or kind not in FAMILIES:
        return f"the engine does not know the family {kind!r}, only {', '.join(CHECKED)}"
    if missing := [name for name in _NEEDED if getattr(config, name, None) is None]:
        return f"config.json does not have {missing[0]}"
    for name in _COUNTS:
        if type(value := getattr(config, name)) is not int or value < 1:
            return f"config.json: {name} must be a positive whole number, got {value!r}"
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and len(kinds) != config.num_hidden_layers:
        return f"config.json: layer_types has {len(kinds)} entries for {config.num_hidden_layers} layers"
    if not kinds and getattr(config, "sliding_window", None) is not None and kind not in _WINDOWS:
        return f"config.json: sliding_window without layer_types is none of {kind}'s settings"
    if config.num_attention_heads % config.num_key_value_heads:
        return f"{config.num_attention_heads} heads do not share {config.num_key_value_heads} heads of keys evenly"
    if config.num_attention_heads > _GROUP * config.num_key_value_heads:
        return f"more than {_GROUP} heads share a head of keys"
    row = FAMILIES[kind]
    if row.clips(config) or row.query_growth:
        return f"{row.clip or row.query_growth} is not supported"
    if getattr(config, "use_bidirectional_attention", False):
        return "attention that sees later tokens is not supported"
    if _activation(row, config) not in ACTIVATIONS:
        return f"the activation {_activation(row, config)!r} is not supported"
    if getattr(config, "pretraining_tp", 1) not in (1, None):
        return "pretraining_tp is not supported"
    return _why_not_rope(config)


def _why_not_rope(config: Any) -> str | None:
    if rope_follows_length(config):
        return "RoPE that follows the length of the text is not supported"
    for kind in set(getattr(config, "layer_types", None) or [None]):
        try:
            settings = rope_settings(config, kind)
        except PaleyError as error:
            return str(error)
        if settings.get("rope_type", "default") not in KINDS:
            return f"RoPE of type {settings.get('rope_type')!r} is not supported"
        partial = settings.get("partial_rotary_factor") not in (None, 1, 1.0)
        if settings.get("partial_rotary_factor") is None and config.model_type in _HALF:
            return "rope_parameters does not say which part of a head RoPE turns (partial_rotary_factor)"
        try:
            rope_of(settings, 64, config)
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            return f"rope_parameters of type {settings.get('rope_type')!r} lacks a setting, or has a bad one ({error})"
        if partial and settings.get("rope_type", "default") == "default" and config.model_type not in _PARTIAL:
            return "RoPE of a part of each head is not supported"  # transformers turns the whole head there
    return None


def _why_not_schemes(facts: Facts) -> str | None:
    """Also refused by a model in PyTorch, or computed by it alone."""
    stream, spec = facts.spec.stream, facts.spec
    if stream is not None and stream.out_dim != facts.config.hidden_size:
        return f"stream ends at {stream.out_dim} values, hidden_size is {facts.config.hidden_size}"
    attentions = [facts.sites.attention(block) for block in range(facts.sites.blocks)]
    if unknown := sorted(set(spec.attentions) - set(attentions)):
        return f"the model has no attention {unknown[0]}"
    for block, name in enumerate(attentions):
        if (scheme := spec.attentions.get(name)) is None:
            continue
        if (reason := _why_not_attention(scheme)) is not None:
            return f"{name}: {reason}"
        centered = scheme.keys is not None and scheme.center_keys
        if centered and scheme.center_keys is not True and not facts.row.has_rope(facts.config, block):
            return f"{name}: center_keys={scheme.center_keys!r} without RoPE is not supported"
        if centered and scheme.center_keys is True and facts.number("attention_softcap", 0.0):
            return f"{name}: keys without their mean and capped scores are not supported"
    for name, scheme in spec.linears.items():
        if scheme.input is not None and (reason := why_not_rounded(scheme.input)) is not None:
            return f"{name}: {reason}"
    return None


def _why_not_biases(facts: Facts) -> str | None:
    """A layer without the bias that its family gives it, or with one that it has not, is another model."""
    for site in facts.sites.weights:
        if site.kind != "linear":
            continue
        found, wanted = f"{site.name}.bias" in facts.checkpoint, _has_bias(facts.config, site.name)
        if found != wanted:
            return f"{site.name}.bias is {'missing' if wanted else 'nothing that this model has'}"
    return None


def _has_bias(config: Any, path: str) -> bool:
    """Whether a family's linear has a bias, as its class in transformers 5 makes it."""
    kind, part = config.model_type, path.rpartition(".")[2]
    if part in ("gate_proj", "up_proj", "down_proj"):
        return kind in ("granite", "llama", "smollm3") and bool(getattr(config, "mlp_bias", False))
    if part in ("q_proj", "k_proj", "v_proj"):
        return kind == "qwen2" or (kind not in _NO_BIAS and bool(getattr(config, "attention_bias", False)))
    return (
        part == "o_proj"
        and kind not in (*_NO_BIAS, "glm", "glm4", "qwen2")
        and bool(getattr(config, "attention_bias", False))
    )


def _why_not_attention(scheme: AttentionScheme) -> str | None:
    for what, side in (("keys", scheme.keys), ("values", scheme.values)):
        if side is not None and (reason := why_not_rounded(side)) is not None:
            return f"{what}: {reason}"
        if side is not None and side.grid.size not in [2**b for b in range(2, 9)]:
            return f"{what}: {side.grid.name} has not 2 to 8 whole bits"
    return None


def why_not_rounded(scheme: ActivationScheme) -> str | None:
    """Why values cannot be rounded so while the model runs; None if they can."""
    grid = scheme.grid
    return None if isinstance(grid, Grid) and grid.p == 1 else f"rounding to {grid.name} is not supported"


def _activation(row: Architecture, config: Any) -> str:
    return str(getattr(config, row.activation, None))
