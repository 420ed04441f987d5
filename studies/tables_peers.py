"""docs/results.md: beside other quantizers at equal bytes, and what each part of a preset is worth."""

from __future__ import annotations

from studies.experiment import measured, read

__all__ = ["all_lines", "nearest"]

PEERS = """\
## Beside other quantizers

Off-grid equals of published models (`studies.off_grid`), so that no tool profits from the file that a model came in.
*Bits*: of all tensors, embedding and head included; of names that end in e16 those of the blocks alone. *At no more
bits*: the best row of others that is no larger, and how much less ours loses than it. *For no more loss*: the smallest
row of others that loses no more, and how many times as large it is. Rows called GPTQ, diagonal, budget or gguf,
AutoRound, llm-compressor, GPTQModel, and llama.cpp's importance matrix have seen the calibration text; p2n256, hqq and
nf4 look at weights alone. AutoRound, llm-compressor, GPTQModel, hqq and nf4 leave the embedding in 16 bits. By itself
llama.cpp keeps a tied embedding at 8 bits; rows with a type of the embedding ask for less.
`python -m studies.peers OFFGRID --text FILE --test-text FILE --seq-len 512 --gguf FILE`
"""
ABLATION = """\
## What each part is worth

Presets with one part changed; embedding and head in 16 bits. *So*: the same, aiming at the residual stream. *Bits*: of
the quantized linears, for each weight. Seconds and peak memory are those of the whole run, the scores included, on a
machine with other work.
`python -m studies.ablation MODEL --text FILE --test-text FILE --seq-len 512`
"""
TRANSFORMS = """\
## What comes before rounding

A simulation on the model as it is, 4 bits in all linears of the blocks: weights to nearest on pairs, inputs on one
scale a token, or inputs in four binary planes. x and w: rms of a channel of the inputs, and of the weights' columns.
`python -m studies.transforms MODEL --text FILE --test-text FILE --seq-len 512`
"""
TUNING = """\
## Tuning after rounding

Scales, gains and biases on the KL to the original, over text that the calibration had not; no code moves. Gains are of
pairs: the same test tokens before and after. `python -m studies.tuning MODEL FOLDER --text FILE --test-text FILE`
"""
_COLUMNS = "| | bits | KL | top-1 | at no more bits | for no more loss |"
OTHERS = ("llama.cpp", "AutoRound", "llm-compressor", "GPTQModel", "hqq", "bitsandbytes")


def _kl(row: dict) -> str:
    return f"{row['kl']:.4f} ± {row['kl_stderr']:.4f}"


def _text(r: dict) -> str:
    n = r["sequences"]
    return (
        f"**{r['model']}**, on {n['test']} × {r['seq_len']} tokens of {r['text']['test']}; calibrated on "
        f"{n['calibration']} × {r['seq_len']} of {r['text']['calibration']}."
    )


def nearest(row: dict, others: dict[str, dict]) -> tuple[str | None, str | None]:
    """Names: the best of others at no more bits, and the smallest that loses no more."""
    no_larger = [name for name, other in others.items() if other["bits"] <= row["bits"] * 1.001]
    no_worse = [name for name, other in others.items() if other["kl"] <= row["kl"]]
    best = min(no_larger, key=lambda name: others[name]["kl"], default=None)
    return best, min(no_worse, key=lambda name: others[name]["bits"], default=None)


def _beside(row: dict, others: dict[str, dict]) -> str:
    """Two cells."""
    best, smallest = nearest(row, others)
    cells = ["none is so small", "none"]
    if best is not None:
        change = row["kl"] / others[best]["kl"] - 1
        cells[0] = f"{best}: {abs(change):.0%} {'more' if change > 0 else 'less'}"
    if smallest is not None:
        bits = others[smallest]["bits"]
        cells[1] = f"{smallest}: {bits:.2f} bits, × {bits / row['bits']:.2f}"
    return " | ".join(cells)


def peers() -> list[str]:
    lines = [PEERS]
    for r in measured("peers").values():
        others = {name: row for name, row in r["rows"].items() if name.startswith(OTHERS)}
        lines += [_text(r), "", _COLUMNS, "|" + "---|" * 6]
        for name, row in sorted(r["rows"].items(), key=lambda item: item[1]["bits"]):
            beside = " | " if name in others or name.endswith("e16") else _beside(row, others)
            lines.append(f"| {name} | {row['bits']:.2f} | {_kl(row)} | {row['top1_agreement']:.1%} | {beside} |")
        lines.append("")
    if equals := read("off-grid.json"):
        said = [f"{name} {row['kl']:.1e} ± {row['kl_stderr']:.0e}" for name, row in equals["models"].items()]
        lines += [f"KL of the equals to the published models, on 4 × 512 tokens: {', '.join(said)}.", ""]
    return lines


def ablation() -> list[str]:
    lines = [ABLATION]
    for r in measured("ablation").values():
        lines += [_text(r), "", "| | KL | top-1 | bits | seconds | GB |", "|---|---|---|---|---|---|"]
        for name, row in r["rows"].items():
            bits = "" if row["bits"] is None else f"{row['bits']:.2f}"
            lines.append(
                f"| {name} | {_kl(row)} | {row['top1_agreement']:.1%} | {bits} | {sum(row['seconds'].values()):.0f} "
                f"| {row['peak_bytes'] / 1e9:.2f} |"
            )
        lines.append("")
    return lines if len(lines) > 1 else []


def transforms() -> list[str]:
    lines = [TRANSFORMS]
    for r in measured("transforms").values():
        lines += [_text(r), "", "| | KL | top-1 |", "|---|---|---|"]
        lines += [f"| {name} | {_kl(row)} | {row['top1_agreement']:.1%} |" for name, row in r["rows"].items()]
        lines.append("")
    return lines if len(lines) > 1 else []


def tuning() -> list[str]:
    lines = [TUNING]
    for r in measured("tuning").values():
        lines += [f"**{r['model']}**", "", "| | KL before | KL after | gain | seconds |", "|---|---|---|---|---|"]
        for name, row in r["rows"].items():
            before = f"{row['kl_before']:.4f} ± {row['kl_before_stderr']:.4f}"
            gain = f"{row['gain']:.4f} ± {row['gain_stderr']:.4f}"
            lines.append(f"| {name} | {before} | {_kl(row)} | {gain} | {sum(row['seconds'].values()):.0f} |")
        lines.append("")
    return lines if len(lines) > 1 else []


def all_lines() -> list[str]:
    return peers() + ablation() + transforms() + tuning()
