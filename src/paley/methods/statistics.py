"""Statistics of a linear's inputs, from which GPTQ works: their second moments, and the outputs to aim at.

On the CPU, values are rounded to bfloat16 before they are summed over tokens: noise of 2⁻⁹, far below any rounding's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import linear

from paley import kernels
from paley.core import products
from paley.core.errors import PaleyError, Setting
from paley.kernels import products as native

__all__ = ["InputStatistics", "Metric", "damping_for"]

LEAST, PER_TOKEN, MOST = 0.01, 1.0, 1.0  # of `damping_for`
_WHOLE = 192  # columns of a triangular matrix that is inverted in one go
RAISED = (0.01, 0.1, 1.0)  # of a diagonal's mean, added to it until the matrix is positive definite


class InputStatistics:
    """Sums over tokens, float32, of a linear's quantized inputs X [tokens, in] and of the outputs that it should have.

    gram = X^T X. The outputs are W X_ref of any weight W, with X_ref the original model's inputs: cross = X_ref^T X
    [in, in]; or Y of one weight alone: aim = Y^T X [out, in]. With neither, they are those of W on X itself.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._gram: Tensor | None = None
        self._has_lower = False  # of gram; sums are taken of the half above the diagonal
        self.cross: Tensor | None = None
        self.aim: Tensor | None = None
        self._metrics: dict[float, Metric] = {}

    def add(self, inputs: Tensor, reference: Tensor | None = None, *, outputs: Tensor | None = None) -> None:
        """inputs, reference [tokens, in], outputs [tokens, out]: one batch; the same of the two in every batch."""
        x = inputs.float()
        self.tokens += len(x)
        self._metrics.clear()
        self._gram, self._has_lower = _add(self._gram, x, x, upper=True), False
        if reference is not None:
            self.cross = _add(self.cross, reference.float(), x)
        if outputs is not None:
            self.aim = _add(self.aim, outputs.float(), x)

    @property
    def damping(self) -> float:
        """How much of its mean to add to gram's diagonal."""
        assert self._gram is not None
        return damping_for(len(self._gram), self.tokens)

    @property
    def gram(self) -> Tensor:
        """Xᵀ X [in, in]."""
        if self._gram is None:
            raise PaleyError("gptq: no input was seen; run the calibration text through the layer first")
        if not self._has_lower:
            _mirror_(self._gram)
            self._has_lower = True
        return self._gram

    def metric(self, damp: float) -> Metric:
        """damp: added to gram's diagonal, as a share of its mean. All linears that read these inputs share it."""
        if damp not in self._metrics:
            mean = float(self.gram.diagonal().mean(dtype=torch.float64))
            self._metrics[damp] = Metric(self.gram, damp * max(mean, 1e-12))
        return self._metrics[damp]

    def target(self, weight: Tensor, damp: float, share: float = 1.0, rows: slice = slice(None)) -> Tensor:
        """-> the weight [out, in] that comes nearest to the wanted outputs, before it is rounded; damped towards W.

        Of cross, this is GPTAQ's target. share: of the way there from the weight itself; 0: stays there. rows: those
        of aim, if `weight` has some alone.
        """
        weight = weight.float()
        if not share or (self.cross is None and self.aim is None):
            return weight
        if self.aim is None:
            assert self.cross is not None
            missing = linear(weight, (self.cross - self.gram).T)
        elif (aim := self.aim[rows]).shape == weight.shape:
            missing = aim - linear(weight, self.gram)
        else:
            raise PaleyError(f"gptq: the outputs are of a weight {list(aim.shape)}, not {list(weight.shape)}")
        spread = self.metric(damp).spread
        return weight + share * linear(linear(missing, spread), spread.T)  # the damping of both sides cancels


def damping_for(columns: int, tokens: int) -> float:
    """A share of a Gram matrix' mean diagonal: the fewer tokens a column has, the less they are trusted."""
    return min(MOST, max(LEAST, PER_TOKEN * columns / tokens))


class Metric:
    """A damped gram matrix [in, in], and what GPTQ needs of it, computed once and when needed, from float64.

    Errors of all else than `diagonal`: PaleyError if the matrix is not finite, or RAISED is not enough.
    """

    def __init__(self, gram: Tensor, added: float = 0.0):
        """gram float32 [in, in]; added: to its diagonal."""
        self._sums, self._added = gram, added

    @property
    def diagonal(self) -> Tensor:
        """[in]"""
        return (self._sums.diagonal().double() + self._added).float()

    @functools.cached_property
    def _factored(self) -> tuple[Tensor, float]:
        """-> spread, raised."""
        factor, more, raised = _factored(self._sums, self._added)
        self._added += more
        _invert_(factor)
        factor = factor.float()
        return factor.T.flip(0, 1), raised

    @property
    def raised(self) -> float:
        """What had to be added to the diagonal to make it positive definite, as a share of its mean; else 0."""
        return self._factored[1]

    @functools.cached_property
    def gram(self) -> Tensor:
        """G, the matrix with all that was added, float32."""
        _ = self._factored
        gram = self._sums.clone()
        gram.diagonal().copy_(self.diagonal)
        return gram

    @property
    def spread(self) -> Tensor:
        """U float32 [in, in], upper triangular, with G^-1 = U^T U: its rows say where a column's error should go."""
        return self._factored[0]

    @property
    def inverse_diagonal(self) -> Tensor:
        """The diagonal of G^-1 [in]."""
        return self.spread.square().sum(0)

    def ordered(self, order: Tensor) -> Metric:
        """Of the columns in another order."""
        return Metric(self._sums[order][:, order], self._added)


def _add(sums: Tensor | None, left: Tensor, right: Tensor, upper: bool = False) -> Tensor:
    """sums + leftᵀ right, in the memory of `sums`; left [tokens, m], right [tokens, n]."""
    if left.device.type != "cpu":
        return left.T @ right if sums is None else sums.addmm_(left.T, right)
    product = native.products if kernels.backend() == "native" else products.reference
    return product(left.T, right.T, sums, upper=upper)


def _mirror_(upper: Tensor) -> None:
    """Copies the upper half of a square matrix to its lower half."""
    if (half := len(upper) // 2) == 0:
        return
    _mirror_(upper[:half, :half])
    _mirror_(upper[half:, half:])
    upper[half:, :half] = upper[:half, half:].T


def _invert_(upper: Tensor) -> None:
    """An upper triangular matrix becomes its inverse: by halves, in products, twice as fast as a solve for all."""
    if len(upper) <= _WHOLE:
        upper.copy_(torch.linalg.solve_triangular(upper, torch.eye(len(upper)).to(upper), upper=True))
        return
    half = len(upper) // 2
    first, across, last = upper[:half, :half], upper[:half, half:], upper[half:, half:]
    _invert_(first)
    _invert_(last)
    across.copy_((first @ across).neg_() @ last)


def _factored(gram: Tensor, added: float) -> tuple[Tensor, float, float]:
    """-> Lᵀ float64 with J (gram + added) J = L Lᵀ, J the reversal; what it took more than `added`, also as a share.

    So U = J L⁻¹ J is upper triangular, and Uᵀ U the inverse. At most one matrix of float64 is held.
    """
    if not gram.isfinite().all():
        raise PaleyError(
            "gptq: what it reads is NaN or infinite on the calibration text",
            remedy=("look for NaN in the weights before it, or use another text (", Setting("calibration.source"), ")"),
        )
    mean = float(gram.diagonal().mean(dtype=torch.float64)) + added
    for share in (0.0, *RAISED):
        backwards = gram.flip(0, 1).double().T  # in the order of LAPACK, which works in place there
        backwards.diagonal().add_(added + share * mean)
        failed = torch.empty((), dtype=torch.int32, device=gram.device)
        torch.linalg.cholesky_ex(backwards, out=(backwards, failed))
        if not failed:
            return backwards.T, share * mean, share
        del backwards
    raise PaleyError(
        f"gptq: the Hessian is not positive definite, even with {RAISED[-1]:g} of its mean added to its diagonal",
        remedy=(
            "use more or other text (", Setting("calibration.sequences"), ", ", Setting("calibration.source"),
            "), or ", Setting("weights.method", "nearest"),
        ),
    )  # fmt: skip
