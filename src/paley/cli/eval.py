"""`paley eval`: scores a model."""

from __future__ import annotations

import time
from dataclasses import asdict

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
    from paley.cli.work import check_device, evaluate_model, scored_text

    start = time.monotonic()
    device = check_device(device)
    blocks = scored_text(model, data, sequences, seq_len)
    with watching() as monitor:
        result = evaluate_model(model, against, blocks, device, monitor)
    cost = display.Cost(time.monotonic() - start, peak_memory())
    if as_json:
        display.emit({"model": model, "against": against, **asdict(cost), **result.to_dict()})
        return
    display.show(display.eval_table(asdict(result), cost))
    line(display.scored_on(asdict(result)))
