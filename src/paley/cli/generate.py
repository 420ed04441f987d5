"""`paley generate`: a model continues a prompt."""

from __future__ import annotations

from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, say

__all__ = ["generate_verb"]


@verb("generate")
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
    from paley.cli import display
    from paley.cli.generation import generate
    from paley.cli.work import check_device, load_model
    from paley.model.loading import load_tokenizer, resolve

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
    line()
    say(made.summary())
