"""The diagonal before a rotation: the closed form that balances the errors of weights and inputs.

For given relative errors, rounding W D Hᵀ and H D⁻¹ x costs in proportion to ‖W D‖² · ‖D⁻¹ x‖², as the rotation
spreads both errors evenly. By Cauchy-Schwarz the minimum is at d = sqrt(x / w). SmoothQuant (arXiv:2211.10438) with
strength 1/2 has this form; WUSH (arXiv:2512.00956) is the version for whole matrices.

GPTQ's feedback takes most of what uneven inputs cost: in the limit of many bits the error depends on the Gram matrix'
determinant, which d changes by a factor alone, and the best d is 1 / w. What measures best is between, x^a / w^(1 - a).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from paley.core.schemes import LinearScheme

__all__ = ["CALIBRATED", "EVEN", "TOKENS", "balance", "strength_for"]

EVEN = 0.5  # a, for weights rounded to nearest and for inputs
CALIBRATED = 0.25  # for weights by GPTQ alone
TOKENS = 1024  # that the size of a channel is measured on

_RANGE = 2.0**10  # of d around its geometric mean: a dead channel must not decide the scale of all others


def balance(inputs: Tensor, weight: Tensor, strength: float = EVEN) -> Tensor:
    """inputs [in], the size of each channel; weight [out, in], all rows that read it -> d float16 [in], positive.

    strength: a of x^a / w^(1 - a).
    """
    rows = weight.double().square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    columns = (weight.double().square() / rows).mean(0).sqrt()  # each row is rounded with its own scale
    tiny = torch.finfo(torch.float64).tiny
    log = strength * inputs.double().clamp(min=tiny).log() - (1 - strength) * columns.clamp(min=tiny).log()
    seen = (inputs > 0) & (columns > 0)
    middle = log[seen].mean() if bool(seen.any()) else log.new_zeros(())
    log = torch.where(seen, log - middle, 0.0)
    return log.exp().clamp(1 / _RANGE, _RANGE).half()


def strength_for(readers: Iterable[LinearScheme]) -> float:
    """a for an input, by the schemes of the linears that read it."""
    feedback = all(s.weight is not None and s.weight.method == "gptq" and not s.rounds_input_alike for s in readers)
    return CALIBRATED if feedback else EVEN
