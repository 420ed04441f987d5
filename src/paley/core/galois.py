"""Finite fields GF(p^k): what Paley's Hadamard matrices need of them, differences and squares.

An element is an int in [0, q): its base-p digits are the coefficients of a polynomial in x, lowest first,
taken modulo a primitive polynomial of degree k (so x generates the nonzero elements).
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

__all__ = ["GaloisField", "field", "prime_power"]


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p prime and k >= 1; None if q is not a prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None


class GaloisField:
    """GF(q). `exp[i]` = x^i for i < q-1 and `log` is its inverse; ValueError if q is not a prime power."""

    def __init__(self, q: int) -> None:
        pk = prime_power(q)
        if pk is None:
            raise ValueError(f"GF({q}): {q} is not a prime power")
        self.order = q
        self.p, self.k = pk
        self.exp = self._powers_of_x()
        self.log = {element: i for i, element in enumerate(self.exp)}

    def _powers_of_x(self) -> list[int]:
        """1, x, x², …, x^(q-2) modulo the first primitive polynomial x^k + low[k-1]·x^(k-1) + … + low[0]."""
        p, k = self.p, self.k
        one = (1,) + (0,) * (k - 1)
        for low in product(range(1, p), *[range(p)] * (k - 1)):  # low[0] != 0: x is invertible, its powers cycle
            powers, e = [], one
            while not powers or e != one:
                powers.append(sum(digit * p**i for i, digit in enumerate(e)))
                shifted = (0, *e[:-1])
                e = tuple((s - e[-1] * c) % p for s, c in zip(shifted, low, strict=True))
            if len(powers) == self.order - 1:
                return powers
        raise AssertionError(f"no primitive polynomial of degree {k} over GF({p})")

    def character(self, a: int) -> int:
        """The quadratic character: 0 at 0, 1 at nonzero squares, -1 elsewhere (q odd)."""
        return 0 if a == 0 else 1 - 2 * (self.log[a] % 2)

    def jacobsthal(self) -> Tensor:
        """int8 [q, q]: χ(i - j) at row i, column j; symmetric for q ≡ 1 mod 4, skew for q ≡ 3 mod 4."""
        i = torch.arange(self.order)
        difference = torch.zeros(self.order, self.order, dtype=torch.long)
        for w in (self.p**e for e in range(self.k)):
            digit = i // w
            difference += (digit[:, None] - digit[None, :]) % self.p * w
        chi = torch.tensor([self.character(a) for a in range(self.order)], dtype=torch.int8)
        return chi[difference]


@lru_cache(maxsize=16)
def field(q: int) -> GaloisField:
    """GF(q), built once."""
    return GaloisField(q)
