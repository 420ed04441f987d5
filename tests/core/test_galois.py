"""GF(p^k): field axioms, squares, and Jacobsthal's matrix."""

import pytest
import torch

from paley.core.galois import GaloisField, field, prime_power


def test_prime_powers_below_a_hundred():
    found = [q for q in range(100) if prime_power(q)]
    primes = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97]
    assert found == sorted([*primes, 4, 8, 16, 32, 64, 9, 27, 81, 25, 49])
    assert [prime_power(q) for q in (343, 2401, 461, 13691)] == [(7, 3), (7, 4), (461, 1), (13691, 1)]
    assert prime_power(343 * 5) is None


def test_a_field_refuses_an_order_that_is_no_prime_power():
    with pytest.raises(ValueError, match="GF\\(12\\): 12 is not a prime power"):
        GaloisField(12)


def sub(f, a, b):
    """a - b, digit by digit modulo p."""
    return sum((a // w - b // w) % f.p * w for w in (f.p**i for i in range(f.k)))


def mul(f, a, b):
    """a · b by logarithms."""
    return 0 if 0 in (a, b) else f.exp[(f.log[a] + f.log[b]) % (f.order - 1)]


@pytest.mark.parametrize("q", [2, 3, 4, 7, 8, 9, 13, 25, 27, 49])
def test_field_axioms(q):
    f = field(q)
    elements = range(q)
    assert sorted(f.exp) == list(range(1, q))
    assert f.exp[0] == 1

    def add(a, b):
        return sub(f, a, sub(f, 0, b))

    for a in elements:
        assert sub(f, a, a) == 0
        assert mul(f, a, 1) == a
        assert mul(f, a, 0) == 0
        assert {sub(f, a, b) for b in elements} == set(elements)
    triples = [(a, b, (3 * a + 5 * b + 1) % q) for a in elements for b in elements]
    for a, b, c in triples:
        assert add(a, b) == add(b, a)
        assert mul(f, a, add(b, c)) == add(mul(f, a, b), mul(f, a, c))
        assert mul(f, a, mul(f, b, c)) == mul(f, mul(f, a, b), c)


@pytest.mark.parametrize("q", [3, 5, 9, 25, 27, 49, 343])
def test_the_character_marks_the_squares(q):
    f = field(q)
    squares = {mul(f, a, a) for a in range(1, q)}
    assert f.character(0) == 0
    assert all(f.character(a) == (1 if a in squares else -1) for a in range(1, q))


@pytest.mark.parametrize("q", [3, 7, 27, 5, 9, 25, 49, 61])
def test_jacobsthal(q):
    """Jac·Jacᵀ = q·I - J, Jac·1 = 0, symmetric for q ≡ 1 mod 4 and skew for q ≡ 3 mod 4."""
    jac = field(q).jacobsthal().long()
    assert torch.equal(jac @ jac.T, q * torch.eye(q, dtype=torch.long) - 1)
    assert not jac.sum(1).any()
    assert torch.equal(jac.T, jac if q % 4 == 1 else -jac)
