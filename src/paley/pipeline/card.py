"""The model card of a quantized checkpoint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from paley.core.schemes import ActivationScheme, WeightScheme
from paley.eval.figures import with_error
from paley.plan import Plan
from paley.results import EvalResult, Results

__all__ = ["model_card"]

_CARD = """\
---
library_name: transformers
tags: [paley, quantized]
---

# A {model_type} model quantized by Paley

| | |
|---|---|
| weights | {weights} |
| linear inputs | {inputs} |
| keys, values | {keys}, {values} |
| rotation | {rotation} |
| bits per weight, every stored byte counted | {bits:.3f} |
| size | {size:,} bytes (original {original_size:,}) |
{scores}
`results.json` has every figure, `plan.json` every decision.

```python
import paley

model = paley.load("THIS FOLDER")
# or with transformers alone: paley.register(), then
# AutoModelForCausalLM.from_pretrained("THIS FOLDER", dtype=torch.float32)
```

`paley.load` computes in float32, and so were the scores measured. `from_pretrained` without a dtype computes in
{dtype}{apart}.

Without `paley.register()` transformers does not know this format: it only warns, and returns random weights.
"""

_SCORES = """\
| perplexity | {perplexity} (original {reference:.4f}) |
| KL divergence to the original | {kl} nats per token |
| same most likely token | {top1:.2%} |

Measured on {tokens:,} tokens of `{source}`, through the quantized KV cache in chunks; on a text of another domain the
figures differ.
"""

_NO_SCORES = """
Nobody has measured this model: it was quantized without a test text. `paley eval THIS FOLDER --against ORIGINAL` does.
"""


def model_card(results: Results, plan: Plan, dtype: str) -> str:
    """The text of the folder's README.md; dtype: the one that its config.json names."""
    slots = (*plan.linears.values(), *plan.attentions.values())
    rounds = any(getattr(slot, side, None) for slot in slots for side in ("input", "keys", "values"))
    residual = plan.rotation.stream if plan.rotation else None
    inputs = [slot.transform.order for slot in plan.linears.values() if slot.transform]
    heads = [slot.transform.order for slot in plan.attentions.values() if slot.transform and (slot.keys or slot.values)]
    turned = {"inputs": inputs, "queries and keys": heads}
    blocks = [f"{what} in Hadamard blocks of up to {max(orders)}" for what, orders in turned.items() if orders]
    rotation = f"{' and '.join(blocks)}, at run time" if blocks else "none"
    if residual is not None:
        rotation = f"Hadamard of order {residual.order}"
        if residual.out_dim > residual.in_dim:
            rotation += f", residual stream widened from {residual.in_dim}"
    return _CARD.format(
        model_type=results.model_type,
        weights=_schemes(slot.weight for slot in plan.linears.values()) + _outliers(plan),
        inputs=_schemes(slot.input for slot in plan.linears.values()),
        keys=_schemes(slot.keys for slot in plan.attentions.values()),
        values=_schemes(slot.values for slot in plan.attentions.values()),
        rotation=rotation,
        bits=results.bits_per_weight,
        size=results.bytes,
        original_size=results.original_bytes,
        scores=_scores(results.evaluation),
        dtype=dtype,
        apart=", where inputs, keys and values are rounded at other places: its predictions differ" if rounds else "",
    )


def _outliers(plan: Plan) -> str:
    counts = sorted({slot.outliers for slot in plan.linears.values()} - {0})
    return f"; {' or '.join(map(str, counts))} input columns of a layer in int8" if counts else ""


def _scores(measured: EvalResult | None) -> str:
    if measured is None:
        return _NO_SCORES
    assert measured.kl is not None  # a run compares with the original; the path on this machine is not published
    return _SCORES.format(
        perplexity=with_error(measured.perplexity, measured.perplexity_stderr, ".4f"),
        reference=measured.reference_perplexity,
        kl=with_error(measured.kl, measured.kl_stderr, ".4f"),
        top1=measured.top1_agreement,
        tokens=measured.tokens,
        source=Path(measured.source).name if Path(measured.source).exists() else measured.source,
    )


def _schemes(schemes: Iterable[WeightScheme | ActivationScheme | None]) -> str:
    """'p2n64 × 12, p2n256 × 2': what is really in the slots, the most frequent first."""
    found = Counter("16 bits" if scheme is None else scheme.grid.name for scheme in schemes)
    return ", ".join(f"{grid} × {count}" if len(found) > 1 else grid for grid, count in found.most_common())
