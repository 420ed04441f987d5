"""The diagonal before a rotation: the closed form that balances the errors of weights and inputs.

For given relative errors, rounding W D Hᵀ and H D⁻¹ x costs in proportion to ‖W D‖² · ‖D⁻¹ x‖², as the rotation
spreads both errors evenly. By Cauchy-Schwarz the minimum is at d = sqrt(x / w). SmoothQuant (arXiv:2211.10438) with
strength 1/2 has this form; WUSH (arXiv:2512.00956) is the version for whole matrices.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["balance"]

_RANGE = 2.0**10  # of d around its geometric mean: a dead channel must not decide the scale of all others


def balance(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs [in], the size of each channel; weight [out, in], all rows that read it -> d float16 [in], positive."""
    rows = weight.double().square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    columns = (weight.double().square() / rows).mean(0).sqrt()  # each row is rounded with its own scale
    tiny = torch.finfo(torch.float64).tiny
    log = (inputs.double().clamp(min=tiny).log() - columns.clamp(min=tiny).log()) / 2
    seen = (inputs > 0) & (columns > 0)
    middle = log[seen].mean() if bool(seen.any()) else log.new_zeros(())
    log = torch.where(seen, log - middle, 0.0)
    return log.exp().clamp(1 / _RANGE, _RANGE).half()
