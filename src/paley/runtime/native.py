"""The structs of csrc/engine_abi.h, and the engine's functions of the shared library."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

from paley.kernels import native

__all__ = [
    "ACTIVATIONS", "BASES", "STEPS", "STORED", "AttentionStruct", "EmbeddingStruct", "InputStruct", "LinearStruct",
    "ModelStruct", "PartStruct", "SideStruct", "StepStruct", "WireStruct", "array", "library",
]  # fmt: skip

STORED = {"float32": 0, "bfloat16": 1, "float16": 2, "codes": 3, "matrix": 4}  # paley_stored
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}  # paley_activation, by the names of transformers
BASES = {"none": 0, "mean": 1, "turned": 2}  # paley_base
STEPS = ("embed", "norm", "input", "multiply", "rotate", "attend", "gate", "turn", "last", "cap", "scale")


class WireStruct(ctypes.Structure):
    """paley_wire"""

    _fields_ = [("buffer", c_int32), ("start", c_int32), ("width", c_int32)]


class InputStruct(ctypes.Structure):
    """paley_input"""

    _fields_ = [
        ("wire", c_int32), ("width", c_int32), ("outliers", c_int32), ("columns", c_void_p), ("diagonal", c_void_p),
        ("how", c_void_p), ("turn", c_void_p), ("own", c_void_p), ("integers", c_void_p),
    ]  # fmt: skip


class LinearStruct(ctypes.Structure):
    """paley_linear"""

    _fields_ = [
        ("stored", c_int32), ("input", c_int32), ("wire", c_int32), ("adds", c_int32), ("rows", c_int64),
        ("columns", c_int64), ("weight", c_void_p), ("bias", c_void_p), ("bytes", c_int64), ("factor", c_float),
    ]  # fmt: skip


class EmbeddingStruct(ctypes.Structure):
    """paley_embedding"""

    _fields_ = [
        ("stored", c_int32), ("width", c_int32), ("rows", c_int64), ("row_bytes", c_int64), ("weight", c_void_p),
        ("n", c_int32), ("p", c_int32), ("symbol_codes", c_int32), ("symbol_bits", c_int32), ("groups", c_int32),
        ("points", c_void_p), ("scales", c_void_p), ("zeros", c_void_p), ("back", c_void_p), ("stream", c_void_p),
        ("factor", c_float),
    ]  # fmt: skip


class SideStruct(ctypes.Structure):
    """paley_side"""

    _fields_ = [
        ("bits", c_int32), ("width", c_int32), ("group_size", c_int32), ("affine", c_int32), ("points", c_void_p),
        ("first", c_float), ("step", c_float),
    ]  # fmt: skip


class AttentionStruct(ctypes.Structure):
    """paley_attention"""

    _fields_ = [
        ("queries", c_int32), ("keys", c_int32), ("values", c_int32), ("out", c_int32), ("heads", c_int32),
        ("kv_heads", c_int32), ("size", c_int32), ("layer", c_int32), ("window", c_int32), ("table", c_int32),
        ("table_width", c_int32), ("interleaved", c_int32), ("scaling", c_float), ("cap", c_float),
        ("key_side", SideStruct), ("value_side", SideStruct), ("turn", c_void_p), ("key_how", c_void_p),
        ("value_how", c_void_p), ("value_back", c_void_p), ("base", c_int32), ("offsets", c_void_p),
    ]  # fmt: skip


class StepStruct(ctypes.Structure):
    """paley_step"""

    _fields_ = [
        ("kind", c_int32), ("input", c_int32), ("other", c_int32), ("out", c_int32), ("index", c_int32),
        ("count", c_int32), ("size", c_int32), ("flag", c_int32), ("value", c_float), ("vector", c_void_p),
        ("how", c_void_p),
    ]  # fmt: skip


class ModelStruct(ctypes.Structure):
    """paley_model"""

    _fields_ = [
        ("buffers", c_int32), ("wires", c_int32), ("inputs", c_int32), ("linears", c_int32), ("embeddings", c_int32),
        ("attentions", c_int32), ("steps", c_int32), ("vocabulary", c_int32), ("layers", c_int32), ("tables", c_int32),
        ("logits", c_int32), ("widths", c_void_p), ("wire", c_void_p), ("input", c_void_p), ("linear", c_void_p),
        ("embedding", c_void_p), ("attention", c_void_p), ("step", c_void_p),
    ]  # fmt: skip


class PartStruct(ctypes.Structure):
    """paley_part"""

    _fields_ = [
        ("context", c_void_p), ("ids", c_void_p), ("tokens", c_int64), ("length", c_int64), ("keep", c_int64),
        ("wanted", c_int32),
    ]  # fmt: skip


_SIGNATURES: dict[str, list[Any]] = {
    "paley_engine_new": [c_void_p, c_int32, c_int32, c_void_p],
    "paley_engine_free": [c_void_p],
    "paley_context_new": [c_void_p, c_void_p],
    "paley_context_free": [c_void_p],
    "paley_context_bytes": [c_void_p, c_void_p],
    "paley_context_truncate": [c_void_p, c_int64],
    "paley_read": [c_void_p, c_void_p, c_int32, c_void_p, c_int64, c_void_p],
}


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library with the engine's signatures set; PaleyError if there is none."""
    found = native.load()
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, c_int32
    return found


def array(kind: Any, items: Sequence[Any]) -> Any:
    """A C array of structs or numbers."""
    return (kind * max(1, len(items)))(*items)
