"""A GGUF file as a folder: its config and tokenizer in transformers' form, and the file itself beside them.

The config comes from the file's own keys, as transformers 5.24 does not take all of them: Llama 3's factors of RoPE,
Gemma 3's scale of attention and its RoPE, Qwen3's size of heads. Tensors stay in the file (`format.gguf`).
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from paley.arch import FAMILIES
from paley.arch.gguf import GGUF, KEYS, ROPE_FACTORS, GgufFamily, family_of
from paley.arch.rope import llama3_factors
from paley.core.errors import PaleyError
from paley.format.checkpoint import GGUF_FILE
from paley.format.files import write_json
from paley.format.gguf import GgufFile
from paley.format.rope import with_older_keys
from paley.model.checks import check_layers
from paley.model.gguf_tokenizer import tokenizer_of

__all__ = ["gguf_folder"]

_CONTEXTS = tuple(2**power for power in range(5, 18))  # that a model may first have been trained with
_GEMMA3_27B = 62  # layers of the one size that llama.cpp scales attention of in another way


def gguf_folder(file: Path) -> Path:
    """A temporary folder, deleted when the process ends, that stands for the file; the same one if asked again.

    Errors: PaleyError for a damaged file, and for a family or a RoPE that Paley does not read.
    """
    stat = file.stat()
    return _made(file.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _made(file: Path, size: int, changed: int) -> Path:
    opened = GgufFile.open(file)
    try:
        config, tokenizer = _config(opened), tokenizer_of(opened)
    except PaleyError:
        raise
    except Exception as error:  # the file is anybody's, and what its values lead to differs from family to family
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise PaleyError(f"{file}: its keys describe no model and tokenizer: {why}") from error
    folder = Path(tempfile.mkdtemp(prefix="paley-gguf-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    named = folder / file.stem  # which errors name
    named.mkdir()
    write_json(named / "config.json", with_older_keys(config))
    (named / GGUF_FILE).symlink_to(file)
    tokenizer.save_pretrained(named)
    return named


def _config(file: GgufFile) -> dict[str, Any]:
    """config.json of the model, from the file's keys."""
    if (kind := family_of(file.architecture)) is None:
        known = ", ".join(dict.fromkeys(family.architecture for family in GGUF.values()))
        raise PaleyError(f"{file.file}: is of architecture {file.architecture!r}; those that Paley reads are {known}")
    family, row = GGUF[kind], FAMILIES[kind]
    if file.key("expert_count"):
        raise PaleyError(f"{file.file}: has experts, which Paley writes to GGUF but does not read from it",
                         remedy="quantize the original checkpoint")  # fmt: skip
    found = {name: file.key(key) for key, name in {**KEYS, **family.keys}.items()}
    if lacking := [key for key, name in KEYS.items() if found[name] is None and key != "vocab_size"]:
        raise PaleyError(f"{file.file}: has no key {file.architecture}.{lacking[0]}; copy or download the file again")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise PaleyError(f"{file.file}: has no tensor token_embd.weight; give a whole language model")
    check_layers(file.file, found, file.tensors)
    layers, heads = found["num_hidden_layers"], found["num_attention_heads"]
    head_dim = file.key("attention.key_length") or found["hidden_size"] // heads
    if (turned := file.key("rope.dimension_count")) not in (None, head_dim):
        raise PaleyError(f"{file.file}: RoPE turns {turned} of {head_dim} values, which Paley does not read from GGUF")
    found |= {
        "vocab_size": embedding.shape[0], "head_dim": head_dim, "rope_parameters": _rope(file, family, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors, row.activation: family.activation,
        **{f"{name}_token_id": file.get(f"tokenizer.ggml.{theirs}_token_id")
           for name, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))},
    }  # fmt: skip
    if "stream" in family.biased:
        found["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if family.windows > 1:
        found["layer_types"] = [
            "sliding_attention" if (i + 1) % family.windows else "full_attention" for i in range(layers)
        ]
    if row.rope_layers:
        found[row.rope_layers] = [int((i + 1) % family.rope_every > 0) for i in range(layers)]
    if row.query_scalar:
        whole = file.architecture == "gemma3" and layers == _GEMMA3_27B
        found[row.query_scalar] = found["hidden_size"] // heads if whole else head_dim
    given = {name: value for name, value in found.items() if value is not None}
    config = AutoConfig.for_model(kind, **given)
    made: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return {**config.to_diff_dict(), "architectures": [made.__name__]}


def _rope(file: GgufFile, family: GgufFamily, head_dim: int) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(file.key("rope.freq_base") or 10000.0)}
    scaling = file.key("rope.scaling.type")
    if scaling == "linear":
        rope |= {"rope_type": "linear", "factor": float(file.key("rope.scaling.factor"))}
    elif scaling == "yarn":
        rope |= {"rope_type": "yarn", "factor": float(file.key("rope.scaling.factor"))}
        rope["original_max_position_embeddings"] = file.key("rope.scaling.original_context_length") or file.key(
            "context_length"
        )
    elif scaling not in (None, "none"):
        raise PaleyError(f"{file.file}: rope.scaling.type must be linear, yarn or none here, got {scaling!r}")
    if (factors := file.tensors.get(ROPE_FACTORS)) is not None:
        rope |= _llama3(file, factors.read().double(), rope["rope_theta"], head_dim)
    if family.local_theta is None:
        return rope
    local = float(file.key("rope.freq_base_swa") or family.local_theta)
    return {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _llama3(file: GgufFile, factors: torch.Tensor, theta: float, head_dim: int) -> dict[str, Any]:
    """The settings that give these factors, as Llama 3 has them: 1 to 4 turns in the first context are between."""
    factor = float(factors.max())
    for context in _CONTEXTS:
        rope = {
            "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": context,
        }  # fmt: skip
        wanted = torch.tensor(llama3_factors(rope | {"rope_theta": theta}, head_dim), dtype=torch.float64)
        if factors.shape == wanted.shape and torch.allclose(wanted, factors, rtol=1e-4):
            return rope
    raise PaleyError(f"{file.file}: {ROPE_FACTORS} divides frequencies in another way than Llama 3 does, which no "
                     "config says; give the original checkpoint")  # fmt: skip
