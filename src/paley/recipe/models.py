"""The schema of recipes. A recipe is what is wanted; a plan (`paley.plan`) is what was decided."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from paley.core.errors import PaleyError, nearest_name
from paley.core.grids import load as load_grid
from paley.core.rounding import fitting_group_size
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform

__all__ = ["Budget", "Calibration", "Override", "Recipe", "Search", "Test", "Tune"]

Weight = WeightScheme | None
Activation = ActivationScheme | None
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(ge=1)]
SeqLen = Annotated[int, Field(ge=2)]
Bits = Annotated[FiniteFloat, Field(gt=0)]
Expansion = Annotated[int, Field(ge=0)] | Literal["auto"]
_PLACES = ("weight", "input", "outliers", "keys", "values")
S = TypeVar("S", LinearScheme, AttentionScheme)
Grouped = TypeVar("Grouped", WeightScheme, ActivationScheme)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Calibration(_Frozen):
    """Text for GPTQ's Hessians: source as in `paley.data.documents`, or `self`."""

    source: Text = "pydoc"
    sequences: Positive = 128
    seq_len: SeqLen = 512


class Search(_Frozen):
    """The search for clip ratios; source None: a disjoint part of the calibration's source."""

    method: Literal["none", "gbs"] = "gbs"
    schedule: Literal["paley", "paper"] = "paley"
    slots: Literal["shared", "per_projection"] = "shared"
    start: Literal["from_fp", "from_low_bit"] = "from_low_bit"
    objective: Literal["kl", "perplexity"] = "kl"
    source: Text | None = None
    sequences: Positive = 16
    seq_len: SeqLen = 512
    iterations: Positive | None = None

    @property
    def trials(self) -> int:
        """Iterations of one site's search: as given, else ten (paper) or two (paley)."""
        return self.iterations or (10 if self.schedule == "paper" else 2)


class Test(_Frozen):
    """The text for scores; source None: a disjoint part of the calibration's source.

    A recipe with test null measures nothing: the run is quicker, and a data-free one never holds the whole model.
    """

    __test__: ClassVar[bool] = False  # not a pytest class

    source: Text | None = None
    sequences: Positive = 64
    seq_len: SeqLen = 512


class Tune(_Frozen):
    """Tunes scales, norms' gains and biases after rounding, on the KL to the original; no code moves (docs/methods.md).

    The text comes after the calibration's in its source, and is cut alike: on the text that its weights were calibrated
    on a model loses so little that there is nothing to learn. One sequence is a step, of at most `rate` of a value's
    own size.
    """

    sequences: Positive = 16
    epochs: Positive = 1
    rate: Annotated[FiniteFloat, Field(gt=0, le=0.1)] = 2e-3
    seed: int = 0


class Budget(_Frozen):
    """Limits. Within them, each site gets the grid of least predicted loss, by measured sensitivities.

    weights: stored bits for each weight of the quantized linears, scales included. size: bytes of all tensors on disk.
    kv, inputs: bits for each cached value, and for each value that a linear reads. read: bytes read to generate a token
    with `context` tokens in the cache, quantized or not. grids: candidates for weights, `keep` for unquantized; null:
    all grids of the same kind as the recipe's. Slopes come from a file, or are measured on `source` (see Sensitivity),
    by gradients unless the method is noise or the metric is not kl.
    A budget counts the model's own widths, and cannot be combined with expansion.
    """

    weights: Bits | None = None
    size: Positive | None = None
    kv: Bits | None = None
    inputs: Bits | None = None
    read: Positive | None = None
    context: Positive = 4096
    grids: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    metric: Literal["kl", "perplexity"] = "kl"
    source: Text = "self"
    sequences: Positive = 16
    seq_len: SeqLen = 512
    method: Literal["gradients", "noise"] | None = None
    levels: Annotated[int, Field(ge=3)] = 15

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if all(limit is None for limit in (self.weights, self.size, self.kv, self.inputs, self.read)):
            raise ValueError("limits nothing: give weights, size, kv, inputs or read")
        if self.method == "gradients" and self.metric != "kl":
            raise ValueError(f"method: gradients tell of kl, not of {self.metric}; set noise")
        for name in self.grids or ():
            if name != "keep":
                load_grid(name)
        return self


class Override(_Frozen):
    """Other schemes for the modules whose name fits `pattern` (fnmatch, case-sensitive).

    weight, input and outliers apply to linear layers, keys and values to attentions. A field that is not given changes
    nothing. A field that is null leaves its tensor unquantized. keep leaves the whole module unquantized.
    """

    pattern: Text
    weight: Weight = None
    input: Activation = None
    keys: Activation = None
    values: Activation = None
    outliers: Annotated[int, Field(ge=0)] = 0
    keep: bool = False

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        schemes = self._schemes()
        if self.keep and schemes:
            raise ValueError(f"keep leaves {self.pattern!r} unquantized and excludes {', '.join(schemes)}")
        if not self.keep and not schemes:
            raise ValueError(f"changes nothing for {self.pattern!r}: give {', '.join(_PLACES)}, or keep: true")
        return self

    @model_serializer(mode="wrap")
    def _only_given(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        given = self._schemes()
        return {k: v for k, v in handler(self).items() if k == "pattern" or k in given or (k == "keep" and v)}

    def _schemes(self) -> dict[str, Any]:
        """The scheme fields that were given, null ones too."""
        return {name: getattr(self, name) for name in _PLACES if name in self.model_fields_set}

    def apply(self, name: str, scheme: S) -> S:
        """scheme of the module `name` -> the scheme with this override's changes."""
        if not fnmatch.fnmatchcase(name, self.pattern):
            return scheme
        names = ("weight", "input", "outliers") if isinstance(scheme, LinearScheme) else ("keys", "values")
        given = dict.fromkeys(names) if self.keep else self._schemes()
        fields = {n: given.get(n, getattr(scheme, n)) for n in names}
        if "outliers" in fields and fields["weight"] is None:
            fields["outliers"] = 0
        try:
            return replace(scheme, **fields)
        except PaleyError as error:
            raise PaleyError(f"{name}: {error}") from None


class Recipe(_Frozen):
    """How to quantize a model; null schemes leave those tensors unquantized.

    embedding, head: schemes of the word embedding and of lm_head; a tied pair shares one tensor, so one grid.
    rotate: `folded` rotates the residual stream and the value heads inside the weights (QuaRot, arXiv:2404.00456), and
    the inputs of o and down at run time; `online` rotates the input of every quantized linear at run time, which needs
    no data and no other tensor of the model (HIGGS, arXiv:2411.17525); `auto` is `folded` if an expansion asks for it,
    else `online`. Both rotate keys and values of the cache.
    diagonal: divide inputs that rotate at run time by sqrt(x / w) first, and multiply the columns of the quantized
    weight by it, so that both have less error (docs/methods.md); x^(1/4) / w^(3/4) where only weights by GPTQ lose. It
    is measured on the calibration text. `auto`: under `online`, where weights are calibrated by GPTQ anyway, or inputs
    have so few bits that they lose about as much as weights.
    hadamard: the largest block that `online` rotates, also the largest for rows of a tied pair; the weights of a block
    share a scale. compensate: GPTQ aims at the outputs for its own inputs (plain), at the original outputs given
    quantized inputs (quantized_inputs: GPTAQ, arXiv:2504.02692), or at the original residual stream (residual_stream);
    compensate_share: how far it goes there from its own outputs, above 0 to 1. As published it is 1, which is nearest
    to the aim in each layer, and loses more in the whole model (docs/methods.md).
    rotate_output: also rotate the input of o_proj, over all heads, at run time. center_keys,
    balance_keys: see AttentionScheme; the latter does nothing without `center_keys: mean`.
    fit_groups: if the group_size of weights or inputs does not divide a layer's stored width, the layer gets the
    nearest divisor (see `fitting_group_size`). The group_size of an override is not changed, and must divide.
    expand and expand_mlp: dimensions added to the residual stream and to down_proj's input.
    outliers: input columns of each quantized linear that stay in int8, see LinearScheme.
    tune: see Tune; null: nothing is tuned after rounding.
    extra_tensors: what becomes of tensors in the files that no module of the model reads, such as heads that predict
    further tokens (`mtp.*`): `drop` leaves them out, `carry` stores them unchanged; either way they are named.
    """

    weights: Weight = None
    embedding: Weight = None
    head: Weight = None
    inputs: Activation = None
    keys: Activation = None
    values: Activation = None
    rotate: Literal["auto", "folded", "online", "none"] = "auto"
    rotate_output: bool = True
    hadamard: Annotated[int, Field(ge=2)] = 1024
    diagonal: bool | Literal["auto"] = False
    fit_groups: bool = False
    budget: Budget | None = None
    center_keys: bool | Literal["mean", "bias"] = False
    balance_keys: bool = False
    expand: Expansion = 0
    expand_mlp: Expansion = 0
    outliers: Annotated[int, Field(ge=0)] = 0
    compensate: Literal["plain", "quantized_inputs", "residual_stream"] = "residual_stream"
    compensate_share: Annotated[float, Field(gt=0, le=1)] = 0.25
    calibration: Calibration = Calibration()
    search: Search = Search()
    tune: Tune | None = None
    test: Test | None = Test()
    overrides: tuple[Override, ...] = ()
    extra_tensors: Literal["drop", "carry"] = "drop"
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    seed: int = 0

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.outliers and self.weights is None:
            raise ValueError("outliers are columns of quantized weights, and no weight is: set outliers: 0")
        if self.rotate in ("online", "none") and self.widens:
            raise ValueError("expand and expand_mlp need rotate: folded; dimensions of zeros alone change nothing")
        return self

    @property
    def widens(self) -> bool:
        return bool(self.expand) or self.expand_mlp not in (0, "auto")  # auto adds only what rotation needs

    @property
    def rotation(self) -> Literal["folded", "online", "none"]:
        """`rotate`, decided, for a family that can be folded."""
        if self.rotate != "auto":
            return self.rotate
        return "folded" if self.widens else "online"

    def wants_diagonal(self, scheme: LinearScheme) -> bool:
        """Whether a linear of this scheme is to have a diagonal if its input turns at run time."""
        if scheme.weight is None or self.diagonal != "auto":
            return scheme.weight is not None and bool(self.diagonal)
        return self.rotation == "online" and (scheme.weight.method == "gptq" or scheme.rounds_input_alike)

    def linear_scheme(
        self, name: str, kind: str, transform: Transform | None = None, width: int | None = None
    ) -> LinearScheme:
        """What is done to the weight `name`, and to a linear's input: the recipe's schemes, then each fitting override.

        kind: linear, embedding or head. width: columns of the stored weight, which fit_groups goes by.
        """
        weight = {"embedding": self.embedding, "head": self.head}.get(kind, self.weights)
        inputs = self.inputs if kind == "linear" else None
        if self.fit_groups and width is not None:
            weight, inputs = _fitted(weight, width), _fitted(inputs, width)
        outliers = self.outliers if kind == "linear" and weight is not None else 0
        scheme = LinearScheme(weight, inputs, transform, outliers)
        for override in self.overrides:
            scheme = override.apply(name, scheme)
        # The inputs of embedding and head are never rounded.
        return scheme if kind == "linear" else replace(scheme, input=None, outliers=0)

    def attention_scheme(
        self, name: str, transform: Transform | None = None, *, rotate_values: bool = False
    ) -> AttentionScheme:
        """What is done to the keys and values of an attention: the recipe's schemes, then each fitting override."""
        scheme = AttentionScheme(
            self.keys, self.values, transform, self.center_keys, self.balance_keys and self.center_keys == "mean",
            rotate_values,
        )  # fmt: skip
        for override in self.overrides:
            scheme = override.apply(name, scheme)
        return scheme

    def check_overrides(self, linears: Iterable[str], attentions: Iterable[str]) -> None:
        """Raises if an override's pattern fits no module that it could change."""
        linears, attentions = list(linears), list(attentions)
        for override in self.overrides:
            given = override._schemes()
            candidates = [n for n in linears if override.keep or given.keys() & {"weight", "input", "outliers"}]
            candidates += [n for n in attentions if override.keep or given.keys() & {"keys", "values"}]
            if not any(fnmatch.fnmatchcase(name, override.pattern) for name in candidates):
                raise PaleyError(
                    f"override {override.pattern!r} with {', '.join(given) or 'keep'} fits none of the "
                    f"{len(candidates)} modules it could change{nearest_name(override.pattern, candidates)}"
                )

    def hash(self) -> str:
        """sha256 of the recipe's canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def _fitted(scheme: Grouped | None, width: int) -> Grouped | None:
    if scheme is None or scheme.group_size is None:
        return scheme
    return replace(scheme, group_size=fitting_group_size(width, scheme.group_size))
