"""Hadamard matrices of every order that Paley can build, and their fast transform.

Orders: Sylvester (2^k), Paley I (q+1, q ≡ 3 mod 4), Paley II (2(q+1), q ≡ 1 mod 4), Kronecker products of
these (Paley, J. Math. Phys. 12, 1933). For orders that none of them reaches: Goethals-Seidel arrays of tabled
sequences (J. Austral. Math. Soc. 11, 1970; made by tools/find_williamson.py). One convention everywhere:
H_n = Sylvester_(2^k) ⊗ H_m with (m, k) = factor(n).
"""

from __future__ import annotations

import json
import math
from functools import lru_cache
from importlib import resources
from itertools import count

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.core.galois import field, prime_power

__all__ = ["factor", "hadamard", "nearest_orders", "transform"]

# One matmul does up to 5 Sylvester steps: 3 to 12 times faster than butterflies of adds.
_STAGE = 5
_SINGLE = 96  # up to this order one matmul is the fastest
_WIDEST = 32  # the first matmul also takes Sylvester steps until its matrix is this wide
_PART = 2**18  # values at a time: 2 MB of float64 stay in a CPU's cache


def hadamard(n: int) -> Tensor:
    """int8 [n, n] of ±1 with H·Hᵀ = n·I, a copy that may be changed; PaleyError if no construction reaches n."""
    m, k = factor(n)
    return torch.kron(_sylvester(k), _dense(m))


def factor(n: int) -> tuple[int, int]:
    """(m, k): n = 2**k · m with the smallest constructible m, the dense part of the fast transform."""
    if n < 1:
        raise PaleyError(f"no Hadamard matrix of order {n}: an order is a positive whole number")
    factors = _factor(n)
    if factors is None:
        below, above = nearest_orders(n)
        if n % 4:
            why = "Hadamard matrices above order 2 have orders divisible by 4"
        else:
            why = "no construction here (Sylvester, Paley I and II, Kronecker products, tables) reaches it"
        raise PaleyError(
            f"no Hadamard matrix of order {n}: {why}; the nearest reachable sizes are {below} and {above}; "
            f"expand the dimension, for instance to {_fast_above(n)}"
        )
    return factors


def nearest_orders(n: int) -> tuple[int, int]:
    """The largest reachable order below n and the smallest above it (n >= 2)."""
    if n < 2:
        raise PaleyError(f"no Hadamard order lies below {n}; give an order of at least 2")
    below, above = n - 1, n + 1
    while _factor(below) is None:
        below -= 1
    while _factor(above) is None:
        above += 1
    return below, above


def _fast_above(n: int) -> int:
    """The smallest reachable order above n with a small dense part (13692 exists, but only as one matrix)."""
    return next(o for o in count(n + 1) if (f := _factor(o)) and f[0] <= max(64, math.isqrt(o)))


def transform(x: Tensor, order: int, *, inverse: bool = False) -> Tensor:
    """x [..., blocks·order] -> H·x/√order on each block of the last dim; `inverse` applies Hᵀ/√order.

    Equals x @ H.T/√order for a single block, in O(m + log(order/m)) work per element. For dtypes other than float64,
    values are first rounded to multiples of one step, at most 3·order·2⁻⁵² of the largest one of their block. Float64
    sums of these are exact in any order, so every device and kernel gives the same bits, cast to float32 and then to
    the dtype of x; a block with NaN or an infinity becomes NaN. PaleyError unless x is floating and its width a
    multiple of order.
    """
    factor(order)
    if not x.is_floating_point():
        raise PaleyError(f"hadamard transform: got {x.dtype}; convert the input to a float dtype")
    if x.dim() == 0 or x.shape[-1] % order or x.shape[-1] == 0:
        raise PaleyError(
            f"hadamard transform: the last dimension of shape {tuple(x.shape)} is not a multiple of "
            f"order={order}; nothing is padded or cut: expand the input or use an order that divides it"
        )
    parts = x.contiguous().view(-1, order).split(max(1, _PART // order))
    return torch.cat([_turned(part, order, inverse) for part in parts]).view(x.shape)


def _turned(blocks: Tensor, order: int, inverse: bool) -> Tensor:
    """blocks [N, order] -> transformed, in their dtype."""
    m, k = factor(order)
    y = blocks.double()
    if blocks.dtype != torch.float64:
        # All values become multiples of the step between floats near `far`: their sums have at most 53 bits.
        far = blocks.detach().abs().amax(-1, keepdim=True).double() * (3 * order)
        y = (y + far).sub_(far)
    first = k if order <= _SINGLE else min(k, max(0, (_WIDEST // m).bit_length() - 1))
    dense = _signs(m, first, y.device)
    y = y.reshape(-1, m << first) @ (dense if inverse else dense.T)
    while first < k:  # Sylvester matrices are symmetric: the same stages serve both directions
        stages = -(-(k - first) // _STAGE)
        bits = (k - first) // stages
        y = _signs(1, bits, y.device) @ y.reshape(-1, 2**bits, m << first)
        first += bits
    y = y.view(blocks.shape).mul_(1 / math.sqrt(order))
    return y if blocks.dtype == torch.float64 else y.float().to(blocks.dtype)


@lru_cache(maxsize=64)
def _signs(m: int, k: int, device: torch.device) -> Tensor:
    """Sylvester_(2^k) ⊗ H_m in float64, shared by all calls: never write to it."""
    # An inference tensor in the cache could not be saved for a backward pass later.
    with torch.inference_mode(False):
        return torch.kron(_sylvester(k), _dense(m)).to(device=device, dtype=torch.float64)


def _sylvester(k: int) -> Tensor:
    """int8 [2^k, 2^k], symmetric, entry (-1)^popcount(i & j)."""
    h = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for _ in range(k):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


# --- which orders exist: arithmetic only, nothing is built ------------------------------------------------


@lru_cache(maxsize=4096)
def _factor(n: int) -> tuple[int, int] | None:
    if n < 1:
        return None
    twos = (n & -n).bit_length() - 1
    odd = n >> twos
    return next(((odd << j, twos - j) for j in range(twos + 1) if _construction(odd << j)), None)


@lru_cache(maxsize=4096)
def _construction(m: int) -> str | None:
    """The construction that gives a dense H_m, or None. `factor` handles doublings."""
    if m == 1:
        return "one"
    if m % 4 or m & (m - 1) == 0:
        return None
    if prime_power(m - 1):  # m - 1 ≡ 3 mod 4
        return "paley1"
    if (m // 2) % 4 == 2 and prime_power(m // 2 - 1):  # m/2 - 1 ≡ 1 mod 4
        return "paley2"
    if m in _tables():
        return "table"
    return "kronecker" if _split(m) else None


def _split(m: int) -> tuple[int, int] | None:
    """(a, b) with a·b = m, both dense constructible and above 2, or None."""
    for a in range(4, math.isqrt(m) + 1, 4):
        if m % a == 0 and _construction(a) and _construction(m // a):
            return a, m // a
    return None


@lru_cache(maxsize=1)
def _tables() -> dict[int, list[str]]:
    """order -> four ± strings of length order/4; the file also has their provenance."""
    text = resources.files("paley.core").joinpath("tables/hadamard.json").read_text(encoding="utf-8")
    return {int(order): entry["rows"] for order, entry in json.loads(text)["orders"].items()}


# --- building ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=32)
def _dense(m: int) -> Tensor:
    """int8 [m, m] on the CPU, checked and shared: callers get a copy."""
    # The cache must hold a plain CPU tensor, whatever mode or default device the caller has set.
    with torch.inference_mode(False), torch.device("cpu"):
        h = _build(m)
        # float64 holds these integer sums exactly (they stay below 2^53), and multiplies far faster than int.
        wide = h.to(torch.float64)
        if not torch.equal(wide @ wide.T, m * torch.eye(m, dtype=torch.float64)):
            raise AssertionError(f"the {_construction(m)} matrix of order {m} is not Hadamard")
    return h


def _build(m: int) -> Tensor:
    kind = _construction(m)
    if kind == "paley1":
        return _paley_one(m - 1)
    if kind == "paley2":
        return _paley_two(m // 2 - 1)
    if kind == "table":
        return _goethals_seidel([[1 if c == "+" else -1 for c in row] for row in _tables()[m]])
    if split := _split(m):
        return torch.kron(_dense(split[0]), _dense(split[1]))
    assert m == 1
    return _sylvester(0)


def _paley_one(q: int) -> Tensor:
    """I + [[0, 1ᵀ], [-1, Jac]]."""
    h = torch.ones(q + 1, q + 1, dtype=torch.int8)
    h[1:, 0] = -1
    h[1:, 1:] = field(q).jacobsthal() + torch.eye(q, dtype=torch.int8)
    return h


def _paley_two(q: int) -> Tensor:
    """C ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] with C = [[0, 1ᵀ], [1, Jac]]."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0] = 0
    c[1:, 1:] = field(q).jacobsthal()
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(c, off) + torch.kron(torch.eye(q + 1, dtype=torch.int8), diagonal)


def _goethals_seidel(rows: list[list[int]]) -> Tensor:
    """Four ±1 first rows of length t, whose periodic autocorrelations sum to 0 -> int8 [4t, 4t]."""
    t = len(rows[0])
    i = torch.arange(t)
    a, b, c, d = (torch.tensor(row, dtype=torch.int8)[(i[None, :] - i[:, None]) % t] for row in rows)
    bt, ct, dt = (x.T.flip(1) for x in (b, c, d))  # flip(1) is the product with the back-identity R
    b, c, d = (x.flip(1) for x in (b, c, d))
    blocks = [[a, b, c, d], [-b, a, -dt, ct], [-c, dt, a, -bt], [-d, -ct, bt, a]]
    return torch.cat([torch.cat(block, 1) for block in blocks])
