"""Writes docs/models.md: families with a row, from the rows; types without one, from bench/results/every-type.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from bench.record import RESULTS

from paley.arch import FAMILIES, Architecture
from paley.runtime.support import CHECKED

OUT = Path(__file__).resolve().parents[1] / "docs" / "models.md"
OUTCOMES = RESULTS / "every-type.json"
HEAD = """\
# Models

Which of transformers' causal language models can be quantized, and how far. Made by `python -m studies.models_page`
from the rows in `src/paley/arch/families.py`, the engine's list in `src/paley/runtime/support.py`, and the outcome of
`python -m bench.every_type`. The name is `model_type` in config.json.

## Families with a row

Each of these has every method: data-free rounding, GPTQ, searches, budgets and sensitivities. Weights, inputs, keys,
values, embedding and head take 8 to 2 bits, and inputs can turn at run time. The table shows the rest.

- **folded**: rotations that can go into the weights (`rotate: folded`). *R1* turns the residual stream, *R2* the heads
  of values. What is not folded turns at run time.
- **GPTQ aims at**: the residual stream, if o and down write to it directly, else the outputs of each linear. Experts
  always aim at their own outputs.
- **expansion**: what can be widened: the stream (`expand`), which needs R1, and down's input (`expand_mlp`).
- **engine**: `generate`, `chat` and `serve` run in native code; otherwise on transformers.

| family | folded | GPTQ aims at | expansion | engine | experts |
|---|---|---|---|---|---|
"""
WITHOUT = """
## Types without a row

Their modules are walked. Weights, embedding, head and inputs can be quantized, with rotations at run time. Keys and
values can if transformers lets attention be replaced, and attention reads from the cache what it wrote there: not the
latents of DeepSeek, which are small already, nor the states of layers without attention. GPTQ needs blocks that can be
run one by one, which is tried out first. Rotations are never folded, nothing is widened, and the engine does not run
them. A small random model of each was quantized with `higgs-4` and with data-free `w4a8kv8`, saved and loaded, and gave
the logits of the one in memory ({of}).

A text can be read in several pieces, as a prompt, a chat and a question with answers are, if the model finds the state
of one piece when it reads the next. Each model of these types is tried out when it is first asked to. transformers'
`mamba`, `falcon_mamba`, `jamba` and `zamba` forget it if several tokens come, so Paley reads them one by one; `bamba`
has to be told positions ([finding](../findings/transformers_mamba_forgets_its_state_between_pieces.sh)). Types without
such a cache (`rwkv`, `xlnet`, `minimax`) and encoders (`bert`) read the whole text again for each token.

With GPTQ and without:

{works}

Data-free only, as their blocks need more than hidden states:

{nearest}

## Types that do not work

| type | what happens |
|---|---|
{fails}

## Types that were not tried

No small random model of these can be made from a config alone.

| type | reason |
|---|---|
{unbuilt}
"""


def folded(row: Architecture) -> str:
    """What of a family's rotations goes into weights."""
    if (why := row.why_stream_is_fixed()) is not None:
        return f"no: {why}"
    if any(norm.reads == row.values for norm in row.norms()):
        return "R1"
    return f"R1, R2 unless `{row.clip}` is set" if row.clip else "R1, R2"


def aim(row: Architecture) -> str:
    return "residual stream" if any(linear.writes == "stream" for linear in row.linears()) else "own outputs"


def expansion(row: Architecture) -> str:
    if row.why_stream_is_fixed() is not None:
        return "no"
    return "down" if row.heads_follow else "stream, down"


def experts(row: Architecture) -> str:
    stacks = any(linear.experts for linear in row.linears())
    return "" if not stacks else "router kept" + (", some layers without" if row.dense else "")


def rows(families: Mapping[str, Architecture]) -> Iterator[str]:
    for name in sorted(families):
        row, engine = families[name], "yes" if name in CHECKED else "no"
        yield f"| `{name}` | {folded(row)} | {aim(row)} | {expansion(row)} | {engine} | {experts(row)} |"


def page(outcomes: Mapping[str, Any]) -> str:
    """The whole page. outcomes: what bench/every_type.py wrote."""
    without = {kind: found for kind, found in outcomes["types"].items() if kind not in FAMILIES}
    types = {kind: sorted({how for name, how in found.items() if name != "gptq"}) for kind, found in without.items()}
    works = [kind for kind, found in types.items() if found == ["works"]]
    whole = {kind: without[kind]["gptq"] == "works" for kind in works}
    unbuilt = {k: found[0] for k, found in types.items() if found[0].startswith("cannot be built")}
    fails = {kind: found for kind, found in types.items() if kind not in works and kind not in unbuilt}
    return (
        HEAD
        + "\n".join(rows(FAMILIES))
        + "\n"
        + WITHOUT.format(
            of=outcomes["of"],
            works=_listed(kind for kind in works if whole[kind]),
            nearest=_listed(kind for kind in works if not whole[kind]),
            fails="\n".join(
                f"| `{kind}` | {_cell('; '.join(why for why in found if why != 'works'))} |"
                for kind, found in fails.items()
            ),
            unbuilt="\n".join(f"| `{kind}` | {_cell(why.partition(': ')[2])} |" for kind, why in unbuilt.items()),
        )
    )


def _listed(kinds: Iterable[str]) -> str:
    return fill(", ".join(f"`{kind}`" for kind in kinds) + ".", 120, break_on_hyphens=False)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    OUT.write_text(page(json.loads(OUTCOMES.read_text())))


if __name__ == "__main__":
    main()
