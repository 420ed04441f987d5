"""Viterbi's search for the codes of a trellis-coded grid (`paley.core.trellis`), in plain torch, and what decodes them.

The search runs in windows along each row. It first reads the cost of each state at each level from a table of 8 bits.
Sums of costs are capped, and a capped sum is a lower bound: a chosen path without one is the best by the table. If it
has one, or if the table lacks the level of a value, the window is searched with squared distances of levels.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paley.core.errors import PaleyError

__all__ = ["FARTHEST", "GREATEST", "MOST_COST", "MOST_SQUARE", "check", "reference", "reference_values"]

FARTHEST = 3840  # greatest level of what is rounded
GREATEST = 512  # greatest level of a state's value
MOST_COST = 2**8 - 1  # of the table and its sums: this much or more
MOST_SQUARE = 2**30  # a path from the given start has less: 24 values of (FARTHEST + GREATEST)^2 are below 2^29
_BYTES = 2**26  # of memory, about
_TILE = 2**20  # codes decoded at a time


def check(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, bits: int,
    states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> None:  # fmt: skip
    """Raises PaleyError for what neither this search nor the native one can do."""
    (rows, wide), (p, size) = x.shape, table.shape
    for name, tensor, dtype, shape in (
        ("x", x, torch.float32, (rows, wide)),
        ("scales", scales, torch.float32, (rows, wide)),
        ("table", table, torch.float32, (p, size)),
        ("levels", levels, torch.int32, (p, size)),
        ("costs", costs, torch.uint8, (p, costs.shape[1] if costs.dim() == 3 else -1, size)),
        ("states", states, torch.int32, (rows,)),
        ("ends", ends, torch.int32, (rows,)),
        ("spread", spread, torch.float32, (columns, wide)),
    ):
        if tensor is None:
            continue
        if (tensor.dtype, tuple(tensor.shape), tensor.device) != (dtype, shape, x.device):
            raise PaleyError(
                f"trellis: {name} is {dtype} {list(shape)} on {x.device}, got {tensor.dtype} {list(tensor.shape)} on "
                f"{tensor.device}; convert it"
            )
    if costs.shape[1] % 2 == 0 or costs.shape[1] > 2 * FARTHEST + 1:
        raise PaleyError(f"trellis: costs have an odd number of levels, at most {2 * FARTHEST + 1}, "
                         f"got {costs.shape[1]}")  # fmt: skip
    if bool((levels.abs() > GREATEST).any()):
        raise PaleyError(f"trellis: levels are within {GREATEST}, got {int(levels.abs().max())}")
    if not (0 <= columns <= wide and keep >= 1 and ahead >= 0):
        raise PaleyError(f"trellis: wants 0 <= columns <= {wide}, keep >= 1 and ahead >= 0, got columns={columns}, "
                         f"keep={keep}, ahead={ahead}")  # fmt: skip
    for name, tensor, least in (("states", states, -1), ("ends", ends, 0)):
        if tensor is not None and bool(((tensor < least) | (tensor >= size)).any()):
            raise PaleyError(f"trellis: {name} are from {least} to {size - 1}, got {tensor.tolist()}")
    if ends is not None:
        _check_ends(states, ends, size, bits, -(-wide // p), ahead)


def _check_ends(states: Tensor, ends: Tensor, size: int, bits: int, steps: int, ahead: int) -> None:
    """Raises PaleyError if no path leads to an end, or if a window that does not see it could lead away from it."""
    memory, overlaps = -(-(size.bit_length() - 1) // bits), size >> bits
    if ahead < memory:
        raise PaleyError(f"trellis: ends need a look ahead of {memory} codes, got ahead={ahead}")
    moved = steps * bits
    apart = (ends % overlaps) >> moved != states % max(overlaps >> moved, 1)
    if moved < overlaps.bit_length() - 1 and bool((apart & (states >= 0)).any()):
        raise PaleyError(f"trellis: {steps} codes do not lead from states {states.tolist()} to ends {ends.tolist()}")


def reference(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`TrellisGrid.codes`. Each float32 operation is rounded by itself, in one order."""
    check(x, columns, scales, table, levels, costs, bits, states, ends, spread, keep, ahead)
    size = table.shape[1]
    few = max(1, _BYTES // (2 * (keep + ahead) * (size >> bits) + 16 * size))
    parts = [
        _some_rows(
            x[rows], columns, scales[rows], table, levels, costs, unit, bits, states[rows],
            None if ends is None else ends[rows], spread, keep, ahead,
        )
        for rows in (slice(start, start + few) for start in range(0, max(len(x), 1), few))
    ]  # fmt: skip
    codes, after, errors = (torch.cat(part) for part in zip(*parts, strict=True))
    return codes, after, errors


def reference_values(codes: Tensor, table: Tensor, bits: int) -> Tensor:
    """`TrellisGrid.decode` of codes [rows, c] -> float32 [rows, c, p]."""
    p, size = table.shape
    values = torch.empty(*codes.shape, p, device=codes.device)
    few = max(1, _TILE // max(1, codes.shape[1]))
    for some, out in zip(codes.split(few), values.split(few), strict=True):
        latest, state = some.int(), torch.zeros_like(some, dtype=torch.int32)
        for back in range(-(-(size.bit_length() - 1) // bits)):
            state |= latest.roll(back, -1) << (back * bits)
        state &= size - 1
        for i, of_states in enumerate(table):
            out[..., i] = of_states[state]
    return values


def _some_rows(
    x: Tensor, columns: int, scales: Tensor, table: Tensor, levels: Tensor, costs: Tensor, unit: float,
    bits: int, states: Tensor, ends: Tensor | None, spread: Tensor | None, keep: int, ahead: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    p, wide = len(table), x.shape[1]
    steps, all_steps = -(-columns // p), -(-wide // p)
    work, errors = x.clone(), x.new_zeros(len(x), columns if spread is not None else 0)
    codes = [states.new_empty(len(x), 0)]
    for start in range(0, steps, keep):
        stop = min(start + keep, steps)
        end = min(stop + ahead, all_steps)
        here = slice(start * p, min(end * p, wide))
        y = torch.nn.functional.pad(work[:, here] / scales[:, here], (0, end * p - here.stop)).unflatten(1, (-1, p))
        y = (y * unit).nan_to_num(nan=-FARTHEST).clamp(-FARTHEST, FARTHEST).round().int()
        last = ends if end == all_steps else None
        path = _viterbi(y, levels, costs, bits, states, last)[:, : stop - start]
        codes.append(path & (2**bits - 1))
        states = path[:, -1]
        if spread is not None:
            first, last = start * p, min(stop * p, columns)
            values = table[:, path].permute(1, 2, 0).flatten(1)[:, : last - first] * scales[:, first:last]
            for i in range(first, last):
                e = work[:, i] - values[:, i - first]
                for k in range(first, i):
                    e = e - errors[:, k] * spread[k, i]
                errors[:, i] = e / spread[i, i]
            for i in range(first, last):
                work[:, last:] -= errors[:, i, None] * spread[i, last:]
    return torch.cat(codes, 1).int(), states.int(), errors


def _viterbi(y: Tensor, levels: Tensor, costs: Tensor, bits: int, states: Tensor, ends: Tensor | None) -> Tensor:
    """Levels y int32 [rows, steps, p] -> states int64 [rows, steps] of the path of least cost; of equals, the first."""
    reach, overlaps = costs.shape[1] // 2, costs.shape[2] >> bits
    places = (y + reach).clamp(0, 2 * reach)
    listed = ([of[place[:, i]] for i, of in enumerate(costs)] for place in places.unbind(1))
    path, unsure = _path(listed, MOST_COST, overlaps, states, ends)
    if len(rows := (unsure | (y.abs() > reach).any(2).any(1)).nonzero()[:, 0]):
        exact = ([(at[:, i, None] - of).square() for i, of in enumerate(levels)] for at in y[rows].unbind(1))
        path[rows] = _path(exact, MOST_SQUARE, overlaps, states[rows], None if ends is None else ends[rows])[0]
    return path


def _path(
    costs: Iterable[list[Tensor]], most: int, overlaps: int, states: Tensor, ends: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Costs of each step's values [rows, size] -> states int64 [rows, steps]; bool [rows]: has a sum of `most`.

    Greater sums become `most`. After each step the least is taken off all.
    """
    sums = torch.full((len(states), overlaps), most, dtype=torch.int32, device=states.device)
    sums[states < 0] = 0
    sums.scatter_(1, (states.long() % overlaps)[:, None], 0)
    full, chosen, size = [], [], overlaps
    for of_values in costs:
        size = of_values[0].shape[1]
        of_each = sums.repeat_interleave(size // overlaps, 1)
        for cost in of_values:
            of_each = (of_each + cost).clamp(max=most)
        sums, at = of_each.unflatten(1, (-1, overlaps)).min(1)
        full.append(sums >= most)
        chosen.append(at.to(torch.uint8))
        sums = sums - sums.amin(1, keepdim=True)
    overlap = sums.argmin(1) if ends is None else ends.long() % overlaps
    path, unsure = [], torch.zeros_like(states, dtype=torch.bool)
    for of_step, at in zip(reversed(full), reversed(chosen), strict=True):
        unsure |= of_step.gather(1, overlap[:, None])[:, 0]
        state = at.gather(1, overlap[:, None])[:, 0].long() * overlaps + overlap
        path.append(state)
        overlap = state // (size // overlaps)
    return torch.stack(path[::-1], 1), unsure


_LIBRARY = torch.library.Library("paley", "FRAGMENT")
_LIBRARY.define(
    "trellis_codes(Tensor x, int columns, Tensor scales, Tensor table, Tensor levels, Tensor costs, float unit, "
    "int bits, Tensor states, Tensor? ends, Tensor? spread, int keep, int ahead) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define("trellis_values(Tensor codes, Tensor table, int bits) -> Tensor")
_LIBRARY.impl("trellis_codes", reference, "CompositeExplicitAutograd")
_LIBRARY.impl("trellis_values", reference_values, "CompositeExplicitAutograd")
