"""Compiles the Triton kernels for a GPU that need not be here: what they take of its registers and shared memory."""

from __future__ import annotations

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]
from triton.compiler import ASTSource  # pyright: ignore[reportMissingImports]

from paley.kernels.gpu.attention import _attend
from paley.kernels.gpu.matmul import _matmul

__all__ = ["compiled"]


def compiled(
    bits: int, p: int, tokens: int, *, affine: bool = False, capability: int = 90, kind: str = "fp16"
) -> dict[str, dict[str, int]]:
    """Kernel -> bytes of shared memory and of machine code, for grids of so many bits a code and p values.

    tokens: a tile's, 1 to 64; if it is 1, all numbers are that may be 1, as Triton compiles them apart. capability: of
    an NVIDIA GPU, 90 for 9.0; kind: of inputs, "fp16", "bf16" or "fp32". Attention is for heads of 128, with a mask.
    """
    target, zeros = GPUTarget("cuda", capability, 32), "*u8" if affine else "*fp16"
    product = {
        "x": f"*{kind}", "codes": "*u8", "table": "*fp32", "scales": "*fp16", "zeros": zeros, "y": f"*{kind}",
        "tokens": "i32", "out": "i32", "row_bytes": "i32", "groups": "i32", "group_codes": "i32",
    }  # fmt: skip
    constants = {"BITS": bits, "SIZE": 2**bits, "P": p, "AFFINE": affine, "M": tokens, "R": 32, "C": 64}
    ones = {"tokens": 1, "groups": 1} if tokens == 1 else {}
    found = {"grid_matmul": _compile(_matmul, product, constants | ones, target)}
    if p == 1 and bits <= 8:
        looking = {
            "q": f"*{kind}", "keys": "*u8", "key_scales": "*fp16", "key_zeros": zeros, "key_table": "*fp32",
            "values": "*u8", "value_scales": "*fp16", "value_zeros": zeros, "value_table": "*fp32", "mask": "*fp32",
            "sums": "*fp32", "parts": "*fp32", "scaling": "fp32",
        }  # fmt: skip
        kernel: Any = _attend
        names = [name for name in kernel.arg_names if name not in looking and not name.isupper()]
        looking |= dict.fromkeys(names, "i32")
        constants = {
            "KEY_BITS": bits, "KEY_SIZE": 2**bits, "KEY_AFFINE": affine, "VALUE_BITS": bits, "VALUE_SIZE": 2**bits,
            "VALUE_AFFINE": affine, "MASKED": True, "Q": 16, "T": 64, "DK": 128, "DV": 128,
        }  # fmt: skip
        if tokens == 1:
            constants |= dict.fromkeys(("rows", "tokens", "kv_heads", "key_groups", "value_groups"), 1)
        found["kv_attention"] = _compile(_attend, looking, constants, target)
    return found


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], target: Any) -> dict[str, int]:
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    made = triton.compile(ASTSource(kernel, signature, places), target=target, options={"enable_fp_fusion": True})
    return {"shared_bytes": int(made.metadata.shared), "code_bytes": len(made.asm["cubin"])}
