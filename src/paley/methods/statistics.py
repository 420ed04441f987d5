"""Statistics of a linear's inputs, from which GPTQ works: their second moments, and the outputs to aim at.

On the CPU, values are rounded to bfloat16 before they are summed over tokens: noise of 2⁻⁹, far below any rounding's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from paley import kernels
from paley.core import products
from paley.core.errors import PaleyError, Setting
from paley.kernels import products as native

__all__ = ["InputStatistics", "Metric"]

LEAST, PER_TOKEN, MOST = 0.01, 1.0, 1.0  # of `InputStatistics.damping`
RAISED = (0.01, 0.1, 1.0)  # of a diagonal's mean, added to it until the matrix is positive definite


class InputStatistics:
    """Sums over tokens, float32, of a linear's quantized inputs X [tokens, in] and of the outputs that it should have.

    gram = X^T X. The outputs are W X_ref of any weight W, with X_ref the original model's inputs: cross = X_ref^T X
    [in, in]; or Y of one weight alone: aim = Y^T X [out, in]. With neither, they are those of W on X itself.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._upper: Tensor | None = None  # half of gram, without what mirrors it
        self.cross: Tensor | None = None
        self.aim: Tensor | None = None
        self._metrics: dict[float, Metric] = {}

    def add(self, inputs: Tensor, reference: Tensor | None = None, *, outputs: Tensor | None = None) -> None:
        """inputs, reference [tokens, in], outputs [tokens, out]: one batch; the same of the two in every batch."""
        x = inputs.float()
        self.tokens += len(x)
        self._metrics.clear()
        self.__dict__.pop("gram", None)
        self._upper = _add(self._upper, x, x, upper=True)
        if reference is not None:
            self.cross = _add(self.cross, reference.float(), x)
        if outputs is not None:
            self.aim = _add(self.aim, outputs.float(), x)

    @property
    def damping(self) -> float:
        """How much of its mean to add to gram's diagonal: the fewer tokens a column has, the less they are trusted."""
        assert self._upper is not None
        return min(MOST, max(LEAST, PER_TOKEN * len(self._upper) / self.tokens))

    @functools.cached_property
    def gram(self) -> Tensor:
        """Xᵀ X [in, in]."""
        if self._upper is None:
            raise PaleyError("gptq: no input was seen; run the calibration text through the layer first")
        return self._upper.triu() + self._upper.triu(1).T

    def metric(self, damp: float) -> Metric:
        """damp: added to gram's diagonal, as a share of its mean. All linears that read these inputs share it."""
        if damp not in self._metrics:
            gram = self.gram.double()
            gram.diagonal().add_(damp * max(float(gram.diagonal().mean()), 1e-12))
            self._metrics[damp] = Metric(gram)
        return self._metrics[damp]

    def target(self, weight: Tensor, damp: float, compensate: bool, rows: slice = slice(None)) -> Tensor:
        """-> the weight [out, in] that comes nearest to the wanted outputs, before it is rounded; damped towards W.

        Of cross, this is GPTAQ's target. Without compensate it is the weight itself. rows: those of aim, if `weight`
        has some alone.
        """
        weight = weight.float()
        if not compensate or (self.cross is None and self.aim is None):
            return weight
        if self.aim is None:
            assert self.cross is not None
            missing = weight @ (self.cross - self.gram)
        elif (aim := self.aim[rows]).shape == weight.shape:
            missing = aim - weight @ self.gram
        else:
            raise PaleyError(f"gptq: the outputs are of a weight {list(aim.shape)}, not {list(weight.shape)}")
        spread = self.metric(damp).spread
        return weight + missing @ spread.T @ spread  # the damping of both sides cancels


class Metric:
    """A damped gram matrix G [in, in], float64 when it comes, and what GPTQ needs of it, computed once and when needed.

    diagonal [in]: of G as it came. Errors of all else: PaleyError if G is not finite, or RAISED is not enough.
    """

    def __init__(self, gram: Tensor):
        self._gram, self.diagonal = gram, gram.diagonal().float()

    @functools.cached_property
    def _factored(self) -> tuple[Tensor, float]:
        """-> spread, raised; from here on `_gram` has what was added. All in float64 goes but that: it is large."""
        self._gram, factor, raised = _factored(self._gram)
        inverse = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, inverse, upper=True, out=inverse).float(), raised

    @property
    def raised(self) -> float:
        """What had to be added to the diagonal to make G positive definite, as a share of its mean; else 0."""
        return self._factored[1]

    @functools.cached_property
    def gram(self) -> Tensor:
        """G with that, float32 [in, in]."""
        _ = self._factored
        return self._gram.float()

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
        _ = self._factored
        return Metric(self._gram[order][:, order])


def _add(sums: Tensor | None, left: Tensor, right: Tensor, upper: bool = False) -> Tensor:
    """sums + leftᵀ right, in the memory of `sums`; left [tokens, m], right [tokens, n]."""
    if left.device.type != "cpu":
        return left.T @ right if sums is None else sums.addmm_(left.T, right)
    product = native.products if kernels.backend() == "native" else products.reference
    return product(left.T, right.T, sums, upper=upper)


def _factored(gram: Tensor) -> tuple[Tensor, Tensor, float]:
    """gram float64 [in, in] -> G, R upper triangular with G = R R^T, and what was added to G's diagonal for that.

    Of a matrix read backwards, the Cholesky factor backwards is such an R.
    """
    if not gram.isfinite().all():
        raise PaleyError(
            "gptq: what it reads is NaN or infinite on the calibration text",
            remedy=("look for NaN in the weights before it, or use another text (", Setting("calibration.source"), ")"),
        )
    for share in (0.0, *RAISED):
        damped = gram + share * gram.diagonal().mean() * torch.eye(len(gram)).to(gram) if share else gram
        backwards, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed:
            return damped, backwards.flip(0, 1), share
    raise PaleyError(
        f"gptq: the Hessian is not positive definite, even with {RAISED[-1]:g} of its mean added to its diagonal",
        remedy=(
            "use more or other text (", Setting("calibration.sequences"), ", ", Setting("calibration.source"),
            "), or ", Setting("weights.method", "nearest"),
        ),
    )  # fmt: skip
