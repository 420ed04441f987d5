"""Recipes whose every grid and group another tool's file holds exactly: their names, and what they restrict.

Nothing turns or is rounded at run time, as no such file can say it. GPTQ and all else that only chooses codes stays.
"""

from __future__ import annotations

from typing import Any

__all__ = ["TARGETS", "target"]

# ggml: 32 columns share a float16 scale, and in the types with _1 a float16 offset; the others' scales have a sign.
_GGML_GROUP = 32
_Q8_0 = {"grid": "int8", "group_size": _GGML_GROUP, "scale_search": "absmax"}


def _weights(grid: str, group_size: int, scale_search: str) -> dict[str, Any]:
    return {"grid": grid, "group_size": group_size, "method": "gptq", "scale_search": scale_search}


def _ggml(grid: str, scale_search: str) -> dict[str, Any]:
    """Embedding and head in 8 bits, as llama.cpp's quantizer leaves those of widths that 256 does not divide."""
    outer = _Q8_0 | {"method": "nearest"}
    return {"weights": _weights(grid, _GGML_GROUP, scale_search), "embedding": outer, "head": outer}


def _mlx(bits: int) -> dict[str, Any]:
    """Groups of 64 with an offset each. Embedding and head as well, of six bits at least."""
    outer = _weights(f"uint{max(6, bits)}", 64, "mse") | {"method": "nearest"}
    return {"weights": _weights(f"uint{bits}", 64, "mse_diagonal"), "embedding": outer, "head": outer}


TARGETS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> what it is for, the recipe's own keys
    "gguf-q4_0": ("llama.cpp, 4.5 bits", _ggml("uint4", "signed_diagonal")),
    "gguf-q4_1": ("llama.cpp, 5 bits: with offsets", _ggml("uint4", "mse_diagonal")),
    "gguf-q5_0": ("llama.cpp, 5.5 bits", _ggml("uint5", "signed_diagonal")),
    "gguf-q5_1": ("llama.cpp, 6 bits: with offsets", _ggml("uint5", "mse_diagonal")),
    "gguf-q8_0": ("llama.cpp, 8.5 bits", _ggml("int8", "absmax")),
    "ct-w4g128": ("compressed-tensors, vLLM, 4.13 bits", {"weights": _weights("int4", 128, "mse_diagonal")}),
    "ct-w8g128": ("compressed-tensors, vLLM, 8.13 bits", {"weights": _weights("int8", 128, "mse_diagonal")}),
    **{f"mlx-{bits}": (f"MLX, {bits + 0.5:g} bits", _mlx(bits)) for bits in (3, 4, 5, 6, 8)},
}


def target(name: str) -> dict[str, Any]:
    """The recipe called `name`, one of TARGETS, as plain data."""
    return {"rotate": "none", "search": {"method": "none"}} | TARGETS[name][1]
