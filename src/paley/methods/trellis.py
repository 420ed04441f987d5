"""GPTQ's error feedback on a trellis-coded grid: codes are decided a few at a time, with a look ahead.

In QTIP (arXiv:2406.11235) a block of 16 columns is one decision. Here a window slides along each row: a few codes are
kept of each search, and the errors of their columns change all columns to come before the next one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paley.core.trellis import TrellisGrid

__all__ = ["AHEAD", "KEEP", "trellis_feedback"]

KEEP = 16  # codes decided at a time, of a search with feedback: 8 take a quarter longer and err as much
AHEAD = 6  # codes looked at beyond them, as a multiple of those that make a state


def trellis_feedback(
    target: Tensor,
    spread: Tensor,
    grid: TrellisGrid,
    scales: Tensor,
    *,
    block: int,
    keep: int = KEEP,
    ahead: int = AHEAD,
) -> Tensor:
    """target [out, in], scales [out, in], spread [in, in] as in `statistics.Metric` -> codes [out, ceil(in / p)].

    block: columns, after which those beyond are changed by one matmul.
    """
    width, codes, work = target.shape[1], [], target.clone()
    ends = states = grid.ring_ends(target / scales)
    look = ahead * grid.memory
    for start in range(0, width, block):
        stop = min(start + block, width)
        wide = min(stop + look * grid.p, width)
        here, states, errors = grid.codes(
            work[:, start:wide], stop - start, scales[:, start:wide], states, ends if wide == width else None,
            spread=spread[start:stop, start:wide], keep=keep, ahead=look,
        )  # fmt: skip
        codes.append(here)
        work[:, stop:] -= errors @ spread[start:stop, stop:]
    return torch.cat(codes, 1).to(grid.code_dtype)
