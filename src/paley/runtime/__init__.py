"""The engine: a quantized model's decoding in native code, without PyTorch in the loop and without transformers."""

from paley.runtime.engine import Engine, EngineContext
from paley.runtime.support import why_not

__all__ = ["Engine", "EngineContext", "why_not"]
