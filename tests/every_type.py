"""A tiny random model of any type in transformers' causal language models: `tiny_config(kind)`, `save_type(...)`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from paley import hf
from paley.core.errors import PaleyError
from paley.model.adapter import Adapter
from paley.model.loading import open_source
from paley.model.reading import prepare_
from paley.model.replay import runner_of
from paley.pipeline import quantize
from paley.pipeline.execute import execute
from paley.pipeline.monitor import Monitor
from paley.pipeline.resolve import resolve
from paley.recipe import apply_settings, preset

__all__ = [
    "GPTQ",
    "OUTCOMES",
    "RECIPES",
    "TYPES",
    "compared",
    "judged",
    "random_",
    "save_type",
    "tiny_config",
    "tiny_model",
]

OUTCOMES = Path(__file__).parents[1] / "bench" / "results" / "every-type.json"  # how each type does, with its reason
TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_VOCAB, _LAYERS = 128, 2
_SMALL = {
    ("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "d_embed", "decoder_hidden_size", "emb_dim"): 64,
    ("hidden_size_global",): 64,
    ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "d_inner", "ffn_hidden_size"): 96,
    ("dense_intermediate_size", "shared_intermediate_size", "feed_forward_size", "attention_hidden_size"): 64,
    ("intermediate_size_mlp", "moe_shared_expert_intermediate_size", "shared_expert_intermediate_size"): 64,
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"): _LAYERS,
    ("num_encoder_layers", "num_decoder_layers"): _LAYERS,
    ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"): 4,
    ("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"): 4,
    ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "swa_num_key_value_heads"): 2,
    ("head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "swa_head_dim", "kv_channels", "dim_head"): 16,
    ("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input"): _VOCAB,
    ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_target_positions"): 64,
    ("max_seq_len", "max_seq_length", "seq_length"): 64,
    ("moe_intermediate_size", "expert_ffn_hidden_size", "ffn_hidden_size_moe", "expert_hidden_dim"): 32,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"): 2,
    ("n_group", "topk_group", "n_shared_experts", "num_expert_group"): 1,
    ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "index_head_dim"): 16,
    ("qk_rope_head_dim", "rotary_dim"): 8,
    ("qk_head_dim",): 24,
    ("mamba_d_state", "state_size", "ssm_state_size", "mamba_dt_rank", "time_step_rank"): 8,
    ("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"): 8,
    ("mamba_d_head", "mamba_head_dim", "mamba_headdim"): 16,
    ("mamba_n_groups", "n_groups", "mamba_ngroups"): 1,
    ("linear_num_key_heads",): 2,
    ("linear_num_value_heads",): 4,
    ("linear_key_head_dim", "linear_value_head_dim"): 16,
    ("lru_width",): 64,
    ("hidden_size_per_layer_input",): 16,
    ("first_k_dense_replace", "moe_layer_start_index"): 1,
    ("attention_window_size", "sliding_window", "window_size", "attention_chunk_size"): 16,
    ("image_size",): 32,
    ("patch_size",): 16,
}  # fmt: skip
_SIZES = {name: size for names, size in _SMALL.items() for name in names}
_TOKENS = {"pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2}

# Settings of single types: what their config classes demand of each other's sizes.
_OWN: dict[str, dict[str, Any]] = {
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    **{kind: {"unpadded_vocab_size": _VOCAB} for kind in ("inkling2_text", "inkling2_loop_text")},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    **{kind: {"swa_head_dim": 24} for kind in ("dots3_note", "dots3_note_text")},
    "dory": {
        "layer_types": ["sliding_attention", "full_attention"],
        "n_input_layers": 1,
        "n_output_layers": 1,
        "n_recurrent_layers": 0,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    # A layer with states, and one with attention, which few of their default configs have among the first.
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {"mamba_headdim": 16, "n_mamba_heads": 8, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """A config of this type with sizes as small as its class lets them be; settings: of its own."""
    base = CONFIG_MAPPING[kind]
    return base(**_shrunk(base(), _OWN.get(kind, {}) | settings))


def tiny_model(kind: str, **settings: Any) -> PreTrainedModel:
    """A random model of this type, in eval mode; settings: of its config."""
    torch.manual_seed(0)
    config = tiny_config(kind, **settings)
    attention = "sdpa" if MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_sdpa else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return random_(model.eval().requires_grad_(False))


def random_(model: PreTrainedModel) -> PreTrainedModel:
    """Gives every parameter random values that matter: gains near what they are, weights that keep sizes."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise * max(parameter.shape[-1], 16) ** -0.5
        else:
            parameter.data = parameter.data.nan_to_num(0.0).clamp(-4, 4) + 0.05 * noise
    model.tie_weights()
    return model


def save_type(kind: str, folder: Path) -> PreTrainedModel:
    """Saves a tiny model of this type -> the model."""
    model = tiny_model(kind)
    model.save_pretrained(folder)
    return model


GPTQ = "gptq"  # whether a type's blocks can be run one by one
# Weights alone; and inputs, keys and values too.
RECIPES = {
    "higgs-4": ("higgs-4", ()),
    "w4a8kv8": ("w4a8kv8", ("weights.method=nearest", "center_keys=false", "balance_keys=false", "diagonal=false")),
}


@torch.no_grad()
def compared(folder: Path, name: str, output: Path) -> tuple[float, float, int]:
    """Quantizes a saved model without data, and loads it again -> how far its logits are from those of the same model
    quantized in memory, and from the original's, relative to these; and how many weights were quantized.

    The second largest distance of three texts: in one a value may lie on the edge of two steps of its rounding.
    """
    preset_name, settings = RECIPES[name]
    recipe = apply_settings(preset(preset_name), ["test=null", "hadamard=16", *settings])
    source = open_source(folder)
    problem = resolve(source, recipe)
    original = source.load()
    texts = [torch.randint(5, _VOCAB - 1, (2, 14), generator=torch.Generator().manual_seed(i)) for i in (1, 2, 3)]
    wanted = torch.stack([original(ids, use_cache=False).logits for ids in texts])
    made = execute(problem, None, None, Monitor(), "cpu").model
    prepare_(made, "packed", torch.float32)
    in_memory = torch.stack([made(ids, use_cache=False).logits for ids in texts])
    quantize(folder, recipe, output=output)
    loaded = hf.load(output, product="packed")
    stored = torch.stack([loaded(ids, use_cache=False).logits for ids in texts])
    size = wanted.std()
    apart = (stored - in_memory).abs().flatten(1).amax(1).sort().values[1]
    count = sum(scheme.weight is not None for _, scheme in problem.weights())
    return float(apart / size), float((stored - wanted).std() / size), count


@torch.no_grad()
def run_one_by_one(folder: Path) -> None:
    """Raises unless the blocks of a saved model can be run one by one, as GPTQ needs it."""
    adapter = Adapter(open_source(folder).load())
    runner_of(adapter).embed(torch.randint(5, _VOCAB - 1, (2, 14), generator=torch.Generator().manual_seed(1)))


def judged(kind: str, name: str, folder: Path) -> str:
    """ "works", "cannot be built: ..." if no tiny model of this type can be, or what is wrong."""
    try:
        save_type(kind, folder / "model")
    except Exception as error:  # what a config class demands is its own
        return f"cannot be built: {_one_line(error)}"
    try:
        if name == GPTQ:
            run_one_by_one(folder / "model")
            return "works"
        apart, lost, weights = compared(folder / "model", name, folder / "out")
    except PaleyError as error:
        return f"refused: {str(error).replace(str(folder), '')}"
    except Exception as error:
        return f"fails: {_one_line(error)}"
    if weights < 2:
        return f"wrong: only {weights} weights are quantized"
    if not apart < 1e-3:  # float32 products in another order
        return f"wrong: what is loaded is {apart:.1g} of the logits' spread off what was quantized"
    return "works" if lost < 0.9 else f"wrong: the quantized model is {lost:.2g} of the logits' spread off the original"


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _shrunk(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """What makes a config small, of those attributes that it has; inner configs, too."""
    given: dict[str, Any] = {}
    fields = config.to_dict()
    layers = next((fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if fields.get(n)), 0)
    for name, value in fields.items():
        if name in config.attribute_map:
            continue
        if name in config.sub_configs and value is not None:
            inner = getattr(config, name)
            given[name] = inner.to_dict() | _shrunk(inner, own.get(name, {}))
        elif name in _TOKENS and isinstance(value, int | list):
            given[name] = _TOKENS[name]
        elif name.endswith("_token_id") and isinstance(value, int) and value >= _VOCAB:
            given[name] = 4
        elif name == "num_key_value_heads" and fields.get("kv_lora_rank"):  # each head has keys of its own
            given[name] = _SIZES["num_attention_heads"]
        elif name == "per_layer_config" and isinstance(value, dict):
            given[name] = {key: own for key, own in value.items() if int(key) < _LAYERS}
        elif name == "head_dim" and fields.get("qk_rope_head_dim"):
            given[name] = _SIZES["qk_rope_head_dim"]
        elif name in _SIZES and type(value) is int and value > 0:
            given[name] = min(value, _SIZES[name])
        elif isinstance(value, list) and layers and len(value) == layers:
            given[name] = _some(value)
    return given | copy.deepcopy({k: v for k, v in own.items() if k not in config.sub_configs})


def _some(values: list[Any]) -> list[Any]:
    """As many as there are layers now, of as many kinds as there were."""
    if not values or not isinstance(values[0], str):
        return values[:_LAYERS]
    kinds = list(dict.fromkeys(values))
    return (kinds + kinds)[-_LAYERS:] if len(kinds) > 1 else values[:_LAYERS]
