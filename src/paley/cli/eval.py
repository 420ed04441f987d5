"""`paley eval`: scores a model."""

from __future__ import annotations

import time
from dataclasses import asdict

import paley
from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, peak_memory

__all__ = ["eval_verb"]


@verb("eval")
def eval_verb(
    model: options.AnyModel,
    against: options.Against = None,
    data: options.Data = None,
    sequences: options.Sequences = None,
    seq_len: options.SeqLen = None,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Measure perplexity through the quantized cache and, against the original, what was lost.

    Without --data the text is what the model's plan set apart for testing, or for other models the test part
    of Python's own documentation. A text that the plan was tuned on is refused.

    Example: `paley eval llama-w4 --against ./llama --data book.txt`
    """
    from paley.cli import display
    from paley.cli.progress import watching

    start = time.monotonic()
    with watching() as monitor:
        result = paley.score(
            model, against, data=data, sequences=sequences, seq_len=seq_len, device=device, monitor=monitor
        )
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"model": model, "against": against, **asdict(cost), **result.to_dict()})
        return
    display.show(display.eval_table(result, cost))
    line(display.scored_on(result))
