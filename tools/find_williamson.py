"""Makes src/paley/core/tables/hadamard.json: orders up to 1000 that neither Paley nor Kronecker reaches.

    python tools/find_williamson.py [--out src/paley/core/tables/hadamard.json]     (about five seconds)

Every entry is four ±1 sequences of length t = order/4 whose periodic autocorrelations sum to 0; the
Goethals-Seidel array turns them into a Hadamard matrix. Methods:
  williamson  four symmetric sequences, searched here for t = 23, 29: spectral filter, pairs matched by hash
  base        base sequences A, B, C, D give the rows (A;C), (A;-C), (B;D), (B;-D); they come from two Golay
              pairs or from published Turyn-type sequences
  product     T-sequences (from base sequences) times Williamson sequences from Turyn's infinite family:
              Cooper & Wallis, Bull. Austral. Math. Soc. 7 (1972); Turyn, J. Combin. Theory A 12 (1972)
  sds         published supplementary difference sets, unions of cosets ±a·H, H a subgroup of the units mod t
Published sequences are facts, with their sources beside them (several read in SageMath's collection); each
quadruple is checked in integers before it is written.
"""

from __future__ import annotations

import argparse
import json
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np

from paley.core.galois import field, prime_power

# Best, Djokovic, Kharaghani, Ramp, arXiv:1206.4107; n = 36: Kharaghani & Tayfeh-Rezaie, J. Combin. Des. 13
# (2005). A hex digit holds the bits (1 is -1) of one position of X, Y, Z, W; the last has three, without W.
TURYN_TYPE = {
    16: "0000778e52de5561",
    20: "000038e2739c7a0b6951",
    24: "00000b7c2cb2bc4b6cd9a961",
    28: "0000067cde3e50639ab46135aa51",
    30: "000000f70b106f9d427a25e9a96951",
    36: "060989975b685d8fc80750b21c0212eceb26",
}
# Golay, IRE Trans. Inform. Theory 7 (1961) and 8 (1962).
GOLAY = {
    1: ("+", "+"),
    2: ("++", "+-"),
    10: ("++-+-+--++", "++-+++++--"),
    26: ("++++-++--+-+-+--+-+++--+++", "++++-++--+-+++++-+---++---"),
}
# Turyn, J. Combin. Theory A 16 (1974): base sequences of lengths n, n, n-1, n-1.
TURYN = {7: ("++--", "++-+", "+++", "+-+"), 13: ("+++-+++", "++---+-", "++-+--", "++-+--")}

DJOKOVIC_1992A = "Djokovic, Bull. Austral. Math. Soc. 45 (1992)"
DJOKOVIC_1994 = "Djokovic, Australas. J. Combin. 10 (1994)"
# t: (source, H, a, J). Coset 2i is a[i]·H, coset 2i+1 its negative, coset -1 is {0}; each string in J
# lists the cosets whose union is one set.
SDS = {
    43: (
        "Djokovic, J. Combin. Theory A 61 (1992)",
        "1 4 11 16 21 41 35",
        "1 3 7",
        ["1 2 4", "1 2 4", "0 2 3", "3 4 -1"],
    ),
    67: (
        DJOKOVIC_1992A,
        "1 29 37",
        "1 2 3 4 5 6 8 10 12 15 17",
        [
            "0 3 5 6 9 10 13 14 17 18 20",
            "0 2 4 9 11 12 13 16 19 21",
            "1 3 6 10 11 13 14 16 20 21",
            "2 4 6 8 9 11 14 17 19",
        ],
    ),
    73: (
        "Djokovic (2023), skew-Hadamard matrix of order 292",
        "1 2 4 8 16 32 64 55 37",
        "1 3 5 9 11 13 17 25",
        ["4 6 8 14", "8 10 12 14", "4 6 10 12", "-1 0 2 10"],
    ),
    103: (
        DJOKOVIC_1994,
        "1 46 56",
        "1 2 3 4 5 6 7 8 10 12 14 15 17 19 21 23 30",
        [
            "1 3 4 6 8 11 12 14 17 18 20 22 25 27 28 30 32",
            "2 9 10 12 13 14 15 16 20 21 22 23 24 26 28 29 30",
            "0 1 2 3 4 11 12 13 16 17 19 20 21 24 25 26 28 30 31",
            "0 1 2 3 4 5 6 13 15 18 19 20 23 24 25 26 27 28 29 31",
        ],
    ),
    109: (
        "Djokovic, J. Combin. Des. 16 (2008)",
        "1 45 63",
        "1 2 3 4 5 6 8 9 10 11 13 15 16 18 20 23 25 30",
        [
            "0 2 5 7 8 10 12 15 16 19 20 23 24 26 29 30 33 34",
            "4 5 6 7 11 15 18 19 20 22 25 30 32 33 35",
            "0 1 5 6 9 10 11 14 17 20 24 26 27 28 29 31 32",
            "0 3 4 6 7 9 10 12 13 22 24 25 26 27 28 29 31 33 35",
        ],
    ),
    113: (
        DJOKOVIC_1992A,
        "1 16 28 30 49 106 109",
        "1 2 3 5 6 9 10 13",
        ["0 3 4 6 8 10 13 14", "1 3 8 9 10 11 12 13", "0 2 3 5 6 7 12", "1 2 3 5 8 9 15"],
    ),
    127: (
        DJOKOVIC_1992A,
        "1 2 4 8 16 32 64",
        "1 3 5 7 9 11 13 19 21",
        [
            "0 3 5 7 8 10 12 14 16",
            "0 1 3 6 7 9 10 12 14 15",
            "0 1 3 4 5 7 8 9 15 16",
            "1 4 5 6 9 10 13 14 15 16",
        ],
    ),
    151: (
        DJOKOVIC_1994,
        "1 8 19 59 64",
        "1 2 3 4 5 6 9 10 11 12 15 22 27 29 30",
        [
            "0 3 5 6 8 11 13 14 16 19 21 23 25 27 28",
            "2 3 6 13 16 17 20 23 25 26 27 28 29",
            "0 1 2 3 4 6 7 8 9 10 11 12 23 24 27 28",
            "1 4 5 10 11 12 13 14 16 18 19 22 25 26 27 28",
        ],
    ),
    163: (
        DJOKOVIC_1992A,
        "1 38 40 53 58 85 104 133 140",
        "1 2 3 5 6 9 10 15 18",
        [
            "0 2 5 6 9 10 13 14 17",
            "0 1 7 10 12 15 16 17",
            "0 1 3 5 8 13 15 16 17",
            "3 6 7 8 11 12 13 14 16 17",
        ],
    ),
    191: (
        "Djokovic, Combinatorica 28 (2008)",
        "1 39 184 109 49",
        "1 2 3 4 6 8 9 11 12 13 16 17 18 19 22 32 36 38 41",
        [
            "1 7 9 10 11 13 17 18 25 26 30 31 33 34 35 36 37",
            "1 4 7 9 11 12 13 14 19 21 22 23 24 25 26 29 36 37",
            "0 3 4 5 7 8 9 16 17 19 24 25 29 30 31 33 35 37",
            "1 3 4 5 8 11 14 18 19 20 21 23 24 25 28 29 30 32 34 35",
        ],
    ),
    219: (
        "Djokovic, Publ. Elektrotehn. Fak. Ser. Mat. (1992)",
        "1 4 16 37 55 64 148 154 178",
        "1 2 3 5 7 9 11 15 19 22 23 33 73",
        [
            "1 3 5 6 8 11 12 15 17 18 21 22 24",
            "2 6 8 10 11 12 13 16 19 22 23 24",
            "0 1 5 6 10 11 13 14 17 20 21 24 25",
            "0 2 3 4 5 6 7 11 12 13 16 20 23",
        ],
    ),
    239: (
        "Djokovic, Combinatorica 14 (1994)",
        "1 10 24 44 98 100 201",
        "1 2 3 4 5 6 7 8 9 13 14 15 18 21 28 35 42",
        [
            "0 1 2 3 4 5 6 7 14 18 19 21 24 25 29 30",
            "0 1 3 7 9 12 15 18 20 22 26 28 29 30 31 32 33",
            "2 3 4 5 8 9 10 11 13 17 19 21 22 24 27 31 32",
            "0 1 2 3 6 7 8 11 13 15 17 18 19 22 25 26 27 32 33",
        ],
    ),
    241: (
        DJOKOVIC_1992A,
        "1 15 24 54 87 91 94 98 100 119 160 183 205 225 231",
        "1 2 4 5 7 13 19 35",
        ["0 2 4 6 8 11 12 14", "1 3 4 6 7 13 14 15", "6 8 9 10 12 13 14 15", "3 4 5 9 10 13 14"],
    ),
}
# order/4 -> how to make it. ("golay", m, n): T-sequences of length m+n; ("tt", n): of length 3n-1.
BASE = {
    47: ("tt", 16),
    59: ("tt", 20),
    65: ("golay", 64, 1),
    81: ("golay", 80, 1),
    89: ("tt", 30),
    101: ("golay", 100, 1),
    107: ("tt", 36),
}
PRODUCT = {
    39: (("golay", 2, 1), 13),
    93: (("golay", 2, 1), 31),
    119: (("golay", 16, 1), 7),
    133: (("turyn", 7), 19),
    153: (("golay", 16, 1), 9),
    183: (("golay", 2, 1), 61),
    189: (("golay", 26, 1), 7),
    209: (("golay", 10, 1), 19),
    213: (("tt", 24), 3),
    235: (("tt", 16), 5),
    245: (("golay", 4, 1), 49),
    247: (("turyn", 13), 19),
    249: (("tt", 28), 3),
}


def signs(text: str) -> np.ndarray:
    return np.array([1 if c == "+" else -1 for c in text])


def correlation(row: np.ndarray) -> np.ndarray:
    """Periodic autocorrelation, in exact integers: [t] -> [t]."""
    return np.array([int(row @ np.roll(row, s)) for s in range(len(row))])


def complementary(rows: list[np.ndarray]) -> bool:
    """The periodic autocorrelations sum to 0 at every shift but 0."""
    return not np.sum([correlation(row) for row in rows], axis=0)[1:].any()


def golay(n: int) -> tuple[np.ndarray, np.ndarray]:
    """A Golay pair of length n; composite lengths by Turyn's product."""
    if n in GOLAY:
        a, b = GOLAY[n]
        return signs(a), signs(b)
    outer = next(d for d in (26, 10, 2) if n % d == 0)
    (a, b), (c, d) = golay(outer), golay(n // outer)
    half_sum, half_difference = (c + d) // 2, (c - d) // 2
    first = np.kron(a, half_sum) + np.kron(b[::-1], half_difference)
    return first, np.kron(b, half_sum) - np.kron(a[::-1], half_difference)


def base_sequences(recipe: tuple) -> list[np.ndarray]:
    """A, B of one length and C, D of another, whose aperiodic autocorrelations sum to 0."""
    kind, *sizes = recipe
    if kind == "golay":
        return [*golay(sizes[0]), *golay(sizes[1])]
    if kind == "turyn":
        return [signs(s) for s in TURYN[sizes[0]]]
    text = TURYN_TYPE[sizes[0]]
    bits = [f"{int(c, 16):04b}" for c in text[:-1]] + [f"{int(text[-1], 16):03b}"]
    x, y, z, w = (np.array([1 - 2 * int(b[i]) for b in bits if i < len(b)]) for i in range(4))
    return [np.concatenate([z, w]), np.concatenate([z, -w]), x, y]


def t_sequences(recipe: tuple) -> list[np.ndarray]:
    """Four {0, ±1} sequences, one nonzero at each position, whose aperiodic autocorrelations sum to 0."""
    a, b, c, d = base_sequences(recipe)
    left, right = np.zeros_like(a), np.zeros_like(c)
    front = [np.concatenate([(a + b) // 2, right]), np.concatenate([(a - b) // 2, right])]
    return [*front, np.concatenate([left, (c + d) // 2]), np.concatenate([left, (c - d) // 2])]


def turyn_williamson(n: int) -> list[np.ndarray]:
    """Williamson sequences of odd length n = (q+1)/2, q ≡ 1 mod 4: I + R, I - R, S, S (Turyn 1972).

    R and S are the circulant blocks of Paley's conference matrix χ(det(g^x, g^y)), g generating GF(q²), with
    the points of the projective line taken in the order g^(4i), g^(4i+n).
    """
    q = 2 * n - 1
    assert prime_power(q)
    assert q % 4 == 1
    f = field(q * q)

    def psi(z: int) -> int:
        # det(g^z, 1) = g^z - g^(qz), a multiple of the fixed e = g^((q+1)/2), for which e^q = -e.
        value, conjugate = f.exp[z % (q * q - 1)], f.exp[z * q % (q * q - 1)]
        # digit by digit modulo p
        difference = sum((value // w - conjugate // w) % f.p * w for w in (f.p**i for i in range(f.k)))
        if difference == 0:
            return 0
        return 1 - 2 * ((f.log[difference] - (q + 1) // 2) // (q + 1) % 2)

    r = np.array([psi(4 * i) for i in range(n)])
    s = np.array([psi(4 * i + n) for i in range(n)])
    one = np.eye(n, dtype=int)[0]
    return [one + r, one - r, s, s]


def product(ts: list[np.ndarray], ws: list[np.ndarray]) -> list[np.ndarray]:
    """T-sequences [t] times symmetric Williamson sequences [w], t and w coprime -> four rows [t·w]."""
    i = np.arange(len(ts[0]) * len(ws[0]))
    t1, t2, t3, t4 = (s[i % len(s)] for s in ts)
    a, b, c, d = (s[i % len(s)] for s in ws)
    return [
        t1 * a + t2 * b + t3 * c + t4 * d,
        -t1 * b + t2 * a + t3 * d - t4 * c,
        -t1 * c - t2 * d + t3 * a + t4 * b,
        -t1 * d + t2 * c - t3 * b + t4 * a,
    ]


def sds_rows(t: int) -> list[np.ndarray]:
    _, subgroup, generators, sets = SDS[t]
    rows = []
    for text in sets:
        row = np.ones(t, dtype=int)
        for j in map(int, text.split()):
            a = 0 if j < 0 else int(generators.split()[j // 2]) * (1 - 2 * (j % 2))
            row[[a * int(h) % t for h in subgroup.split()]] = -1
        rows.append(row)
    return rows


def search_williamson(t: int, seed: int = 0) -> list[np.ndarray] | None:
    """Four symmetric ±1 sequences of odd length t whose periodic autocorrelations sum to 0 off the peak.

    All 2^((t-1)/2) candidates are filtered by their spectrum (none may exceed 4t). Autocorrelations are
    hashed linearly, so two pairs fit where hash(a) + hash(b) = -(hash(c) + hash(d)). Memory holds all pairs
    of a class: t up to about 33.
    """
    h = (t - 1) // 2
    half = 1 - 2 * ((np.arange(2**h)[:, None] >> np.arange(h)) & 1)
    rows = np.concatenate([np.ones((2**h, 1), dtype=int), half, half[:, ::-1]], axis=1)
    spectrum = np.fft.rfft(rows, axis=1).real ** 2
    rows, spectrum = rows[keep := (spectrum <= 4 * t + 1e-6).all(1)], spectrum[keep]
    correlations = np.rint(np.fft.irfft(spectrum, n=t, axis=1)).astype(np.int64)
    weights = np.random.default_rng(seed).integers(1, 2**40, size=h)
    hashes = correlations[:, 1 : h + 1] @ weights
    totals = np.abs(rows.sum(1))
    odd = range(1, int((4 * t) ** 0.5) + 1, 2)
    for sums in combinations_with_replacement(odd, 4):
        if sum(s * s for s in sums) != 4 * t:
            continue
        a, b, c, d = (np.flatnonzero(totals == s) for s in sums)
        left = (hashes[a][:, None] + hashes[b][None, :]).ravel()
        right = -(hashes[c][:, None] + hashes[d][None, :]).ravel()
        for value in np.intersect1d(left, right):
            i, j = int(np.flatnonzero(left == value)[0]), int(np.flatnonzero(right == value)[0])
            found = [rows[k] for k in (a[i // len(b)], b[i % len(b)], c[j // len(d)], d[j % len(d)])]
            if complementary(found):
                return found
    return None


def entries() -> dict[int, tuple[str, str, list[np.ndarray]]]:
    """order/4 -> (method, source, rows)."""
    made = {}
    for t in (23, 29):
        rows = search_williamson(t)
        assert rows is not None, f"no Williamson quadruple of length {t}"
        made[t] = ("williamson", "found by tools/find_williamson.py", rows)
    for t, recipe in BASE.items():
        a, b, c, d = base_sequences(recipe)
        rows = [np.concatenate(pair) for pair in ((a, c), (a, -c), (b, d), (b, -d))]
        made[t] = (f"base {recipe}", source(recipe), rows)
    for t, (recipe, w) in PRODUCT.items():
        rows = product(t_sequences(recipe), turyn_williamson(w))
        text = f"T-sequences: {source(recipe)}; Williamson sequences: Turyn, J. Combin. Theory A 12 (1972)"
        made[t] = (f"product {recipe} x Williamson {w}", text, rows)
    for t in SDS:
        made[t] = ("supplementary difference sets", SDS[t][0], sds_rows(t))
    return made


def source(recipe: tuple) -> str:
    if recipe == ("tt", 36):
        return "Kharaghani & Tayfeh-Rezaie, J. Combin. Des. 13 (2005)"
    names = {
        "tt": "Best, Djokovic, Kharaghani, Ramp, arXiv:1206.4107",
        "golay": "Golay pairs (Golay 1961, 1962; Turyn 1974)",
        "turyn": "Turyn, J. Combin. Theory A 16 (1974)",
    }
    return names[recipe[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the table of Hadamard matrices.")
    parser.add_argument("--out", type=Path, default=Path("src/paley/core/tables/hadamard.json"))
    orders = {}
    for t, (method, origin, rows) in sorted(entries().items()):
        assert all(len(row) == t and (np.abs(row) == 1).all() for row in rows), t
        assert complementary(rows), t
        text = ["".join("+" if v > 0 else "-" for v in row) for row in rows]
        orders[str(4 * t)] = {"method": method, "source": origin, "rows": text}
    table = {
        "about": "Four circulant first rows for the Goethals-Seidel array: a Hadamard matrix of each order.",
        "made_by": "tools/find_williamson.py",
        "orders": orders,
    }
    out = parser.parse_args().out
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"{out}: {len(orders)} orders: {', '.join(orders)}")


if __name__ == "__main__":
    main()
