"""Paley quantizes Hugging Face causal language models: weights, activations and KV cache, to 4, 3 or 2 bits.

Importing it is light: each name below is imported when it is first used. `paley.load` reads a quantized folder;
transformers' own AutoModelForCausalLM.from_pretrained does after `paley.register()`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from paley.core.errors import PaleyError

if TYPE_CHECKING:
    from paley.core.hadamard import hadamard
    from paley.eval.perplexity import evaluate
    from paley.export.folder import Exported
    from paley.export.formats import export_to
    from paley.export.plain import dequantize
    from paley.hf import load, register
    from paley.model.kv_cache import PackedKVCache, cache_argument
    from paley.pipeline.bench import Bench, bench
    from paley.pipeline.chat import Chat
    from paley.pipeline.doctor import Doctor, doctor
    from paley.pipeline.estimate import Estimate
    from paley.pipeline.generate import Generated, generate
    from paley.pipeline.inspect import Inspection, inspect
    from paley.pipeline.lora import lora_config
    from paley.pipeline.monitor import Monitor
    from paley.pipeline.push import Pushed, push
    from paley.pipeline.run import Outcome, estimate, make_plan, quantize
    from paley.pipeline.sampling import Sampling
    from paley.pipeline.score import score
    from paley.pipeline.sensitivities import measure_sensitivity
    from paley.pipeline.verify import Verified, verify
    from paley.plan import Plan
    from paley.recipe import Recipe, load_recipe, preset
    from paley.results import EvalResult, Results
    from paley.sensitivity import Sensitivity

__all__ = [
    "Bench",
    "Chat",
    "Doctor",
    "Estimate",
    "EvalResult",
    "Exported",
    "Generated",
    "Inspection",
    "Monitor",
    "Outcome",
    "PackedKVCache",
    "PaleyError",
    "Plan",
    "Pushed",
    "Recipe",
    "Results",
    "Sampling",
    "Sensitivity",
    "Verified",
    "__version__",
    "bench",
    "cache_argument",
    "dequantize",
    "doctor",
    "estimate",
    "evaluate",
    "export_to",
    "generate",
    "hadamard",
    "inspect",
    "load",
    "load_recipe",
    "lora_config",
    "make_plan",
    "measure_sensitivity",
    "preset",
    "push",
    "quantize",
    "register",
    "score",
    "verify",
]

__version__ = "0.1.0"

_HOMES = {  # name -> the module that has it
    "Chat": "paley.pipeline.chat",
    "Bench": "paley.pipeline.bench",
    "Doctor": "paley.pipeline.doctor",
    "Exported": "paley.export.folder",
    "Estimate": "paley.pipeline.estimate",
    "EvalResult": "paley.results",
    "Generated": "paley.pipeline.generate",
    "Inspection": "paley.pipeline.inspect",
    "Monitor": "paley.pipeline.monitor",
    "Outcome": "paley.pipeline.run",
    "PackedKVCache": "paley.model.kv_cache",
    "Plan": "paley.plan",
    "Pushed": "paley.pipeline.push",
    "Recipe": "paley.recipe",
    "Results": "paley.results",
    "Sampling": "paley.pipeline.sampling",
    "Sensitivity": "paley.sensitivity",
    "Verified": "paley.pipeline.verify",
    "bench": "paley.pipeline.bench",
    "cache_argument": "paley.model.kv_cache",
    "dequantize": "paley.export.plain",
    "doctor": "paley.pipeline.doctor",
    "estimate": "paley.pipeline.run",
    "evaluate": "paley.eval.perplexity",
    "export_to": "paley.export.formats",
    "generate": "paley.pipeline.generate",
    "hadamard": "paley.core.hadamard",
    "inspect": "paley.pipeline.inspect",
    "load": "paley.hf",
    "load_recipe": "paley.recipe",
    "lora_config": "paley.pipeline.lora",
    "make_plan": "paley.pipeline.run",
    "measure_sensitivity": "paley.pipeline.sensitivities",
    "preset": "paley.recipe",
    "push": "paley.pipeline.push",
    "quantize": "paley.pipeline.run",
    "register": "paley.hf",
    "score": "paley.pipeline.score",
    "verify": "paley.pipeline.verify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'paley' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
