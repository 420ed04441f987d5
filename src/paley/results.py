"""Results: what a run measured of the model that it made, as a JSON file beside it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, FiniteFloat

from paley.core.reading import read_json
from paley.recipe.documents import AnyFloat, Document
from paley.recipe.sources import located_source

__all__ = ["VERSION", "EvalResult", "KeptResult", "LayerResult", "Results"]

VERSION = 1


@dataclass(frozen=True)
class EvalResult:
    """nll, gap and kl in nats a token; tokens counts predictions.

    Each stderr is over the sequences' means, of one run and paired for gap; None if there is one sequence.
    kl is KL(original || quantized). What compares with the original is None without a reference. In
    kv_cache_bytes_per_token an unquantized side (keys or values of a layer) counts as 16 bits a value, whatever
    was computed with; in kv_cache_bytes_per_token_at_16_bits every side does.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    source: str
    sha256: str
    sequences: int
    tokens: int
    nll: AnyFloat
    nll_stderr: AnyFloat | None
    perplexity: AnyFloat
    perplexity_stderr: AnyFloat | None
    kv_cache_bytes_per_token: float
    kv_cache_bytes_per_token_at_16_bits: float
    reference_nll: AnyFloat | None = None
    gap: AnyFloat | None = None
    gap_stderr: AnyFloat | None = None
    kl: AnyFloat | None = None
    kl_stderr: AnyFloat | None = None
    top1_agreement: AnyFloat | None = None
    top1_stderr: AnyFloat | None = None

    @property
    def reference_perplexity(self) -> float | None:
        """The original's; None without a reference."""
        nll = self.reference_nll
        return None if nll is None else math.exp(nll) if nll < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For JSON; what is infinite becomes 'inf', as in plans."""
        values = asdict(self)
        infinite = {k: str(v) for k, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
        return values | infinite


@dataclass(frozen=True)
class LayerResult:
    """rel_error: ‖W − Ŵ‖² / ‖W‖² of a linear's rotated weight; None if its scales were tuned after rounding, when the
    rotated weight is no longer there to compare with.

    experts: the same of each matrix of a stack of experts.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    rel_error: AnyFloat | None = None
    experts: tuple[AnyFloat, ...] | None = None


@dataclass(frozen=True)
class KeptResult:
    """Weights that were taken over from an earlier folder, of which this is the digest; fitted: those of them that a
    run from the beginning might make otherwise.
    """

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    digest: str
    weights: int
    fitted: int = 0


class Results(Document):
    """run: the key of the settings that made the folder. untouched: values of each tensor left unquantized.

    parameters are those of the original, which bits_per_weight divides every stored byte by; bits_per_quantized_weight
    is that of the quantized linears alone, None without any. evaluation: None if nothing was scored. texts: sha256 of
    the tokens of each, by role. kept: None if all weights were made anew. made_with: the versions of Paley, PyTorch and
    transformers, empty if an older Paley wrote the file.
    """

    what: ClassVar[str] = "results file"

    version: Literal[1] = VERSION
    run: str
    model_type: str
    fingerprint: str
    parameters: int
    bits_per_weight: FiniteFloat
    bits_per_quantized_weight: FiniteFloat | None
    bytes: int
    original_bytes: int
    untouched: dict[str, int]
    evaluation: EvalResult | None
    layers: dict[str, LayerResult]
    texts: dict[str, str] = Field(default_factory=dict)
    kept: KeptResult | None = None
    made_with: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """As of documents; a text that the file names by its path from it is found from here."""
        found = super().load(path)
        if (scored := found.evaluation) is None:
            return found
        source = located_source(scored.source, Path(path).parent)
        return found.model_copy(update={"evaluation": replace(scored, source=source)})

    @classmethod
    def beside(cls, folder: Path) -> Self | None:
        """Of a quantized folder; None if it came without, or with those of an older Paley, which have no version."""
        file = folder / "results.json"
        if not file.exists():
            return None
        data = read_json(file, cls.what)
        return None if "version" not in data else cls.load(file)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, as in the file."""
        return self.model_dump(mode="json")
