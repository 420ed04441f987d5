"""The verbs that use, measure and explain: eval, generate, inspect, theory, presets."""

from __future__ import annotations

import time
from dataclasses import asdict

from paley import theory
from paley.cli import display, options
from paley.cli.app import app
from paley.cli.generation import generate
from paley.cli.inspection import Inspection
from paley.cli.process import peak_memory, say
from paley.cli.progress import watching
from paley.cli.work import check_device, evaluate_model, load_model, scored_text
from paley.model.loading import load_tokenizer, resolve
from paley.recipe import examples, preset
from paley.recipe.presets import GRAMMAR

__all__ = ["eval_verb", "generate_verb", "inspect_verb", "presets_verb", "theory_verb"]

# Figure 3's range; one random rotation of 4096 dimensions alone takes a minute.
_THEORY_DIMS = (16, 32, 64, 128, 256, 512, 1024)


@app.command("eval")
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
    display.line(display.scored_on(asdict(result)))


@app.command("generate")
def generate_verb(
    model: options.AnyModel,
    prompt: options.Prompt,
    max_new_tokens: options.MaxNewTokens = 100,
    temperature: options.Temperature = 0.0,
    seed: options.DrawSeed = 0,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Continue a prompt through the packed KV cache; text is streamed, speed and cache size go to stderr.

    Example: `paley generate llama-w4 "Once upon a time" --temperature 0.8`
    """
    device = check_device(device)
    tokenizer = load_tokenizer(resolve(model))
    made = generate(
        load_model(model, device, kernels=True),
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        write=(lambda text: None) if as_json else (lambda text: print(text, end="", flush=True)),
    )
    if as_json:
        display.emit({"model": model, "prompt": prompt, **made.to_dict()})
        return
    display.line()
    say(made.summary())


@app.command("inspect")
def inspect_verb(folder: options.Folder, as_json: options.Json = False) -> None:
    """Show what a quantized folder holds: scheme, clip ratio, measured error and bytes of each layer.

    rel_error is ‖W − Ŵ‖² / ‖W‖² of a layer's rotated weight W and its quantized Ŵ, not an error of its output.
    It can exceed 1 in o_proj and down_proj, which also make up for the errors of the layers before them.

    Only headers are read, so a large model takes no longer than a small one.

    Example: `paley inspect llama-w4`
    """
    inspection = Inspection.of(folder)
    if as_json:
        display.emit(inspection.to_dict())
    else:
        inspection.show()


@app.command("theory")
def theory_verb(output: options.Draw = None, as_json: options.Json = False) -> None:
    """Measure what rotations do to an outlier, beside the bounds: Figure 3 of arXiv:2504.13989.

    One entry of 200 among noise of 0.1 is rotated; shown is the largest entry afterwards, mean of 8 draws.

    Example: `paley theory --output figure3.png`
    """
    if output is not None:
        theory.check_figure(output)
    points = theory.measure_peaks(_THEORY_DIMS)
    if output is not None:
        theory.draw(points, output)
    if as_json:
        drawn = None if output is None else str(output)
        display.emit({"points": [asdict(point) for point in points], "output": drawn})
        return
    display.show(display.peaks_table(points))
    if output is not None:
        display.line(f"written to {output}")


@app.command("presets")
def presets_verb() -> None:
    """List the packaged recipes, and say how their names are read.

    Example: `paley presets`
    """
    display.line(f"NAME = {GRAMMAR}")
    display.line("W, A and KV: bits of the weights, the linear layers' inputs and the KV cache; 16: unquantized.")
    display.line("G: columns of a weight that share a scale, without it the whole row. METHOD, without it gbs:")
    display.show(display.presets_table({name: preset(name) for name in examples()}))
    display.line("--set changes any value, for example --set search.sequences=8 inputs.clip_ratio=0.9 seed=1;")
    display.line("the plan.json that quantize writes begins with the whole recipe.")
