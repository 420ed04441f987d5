"""Embedding and head in codes: what is saved is what comes back, tied or not, folded or turned at run time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import paley
from paley import hf
from paley.core.errors import PaleyError
from paley.core.metrics import kl_divergence
from paley.export.plain import dequantize
from paley.format.checkpoint import Checkpoint
from paley.model.calibrate import ModelQuantizer
from paley.model.coded import Coded
from paley.model.loading import open_source
from paley.pipeline import Monitor, make_plan, quantize
from paley.pipeline.decide import decide
from paley.pipeline.execute import execute
from paley.pipeline.resolve import resolve
from paley.pipeline.saving import sample_logits, save_checkpoint
from paley.pipeline.texts import gather
from paley.recipe import Recipe, apply_settings, preset
from paley.recipe.presets import examples
from tiny_models import EMBEDDING, HEAD, save_tiny, unseal

PRESETS = ("w4a4kv4", "higgs-4", "w4a16e4h4")
FOLDED, WIDER = ("rotate=folded", "expand_mlp=auto"), ("rotate=folded", "expand_mlp=auto", "expand=12")
ONLINE = ("rotate=online", "hadamard=16", "expand_mlp=0")
MODELS: dict[str, tuple[dict[str, Any], tuple[tuple[str, ...], ...]]] = {
    "qwen2 tied": ({"qwen": True}, (FOLDED, WIDER, ONLINE)),
    "qwen2 untied": ({"qwen": True, "tie_word_embeddings": False}, (FOLDED, WIDER, ONLINE)),
    "llama tied": ({"tie_word_embeddings": True}, (FOLDED, WIDER, ONLINE)),
    "llama untied": ({}, (FOLDED, WIDER, ONLINE)),
    "gemma3 tied": ({"gemma": True}, (ONLINE,)),
    "gemma3 untied": ({"gemma": True, "tie_word_embeddings": False}, (ONLINE,)),
}
CASES = [
    pytest.param((m, how, name), marks=[] if how == ONLINE or name == "w4a4kv4" else pytest.mark.long)
    for m, (_, rotations) in MODELS.items()
    for how in rotations
    for name in PRESETS
]
IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = [f"{n} {'abcdefg'[n % 7] * (n % 5 + 1)} story number {n * n}." for n in range(600)]
    file.write_text("\n<|endoftext|>\n".join(" ".join(words[i : i + 9]) for i in range(0, 600, 9)))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    return {
        name: save_tiny(tmp_path_factory.mktemp("models") / "model", tiny_tokenizer, gains=True, **settings)
        for name, (settings, _) in MODELS.items()
    }


def recipe(name: str, text: Path, *settings: str) -> Recipe:
    sizes = [f"{part}.{what}" for part in ("calibration", "search", "test") for what in ("sequences=2", "seq_len=24")]
    return apply_settings(preset(name), [f"calibration.source={text}", "search.method=none", *sizes, *settings])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS, use_cache=False).logits


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *case[1], case[2]]))
def made(request, folders, text, tmp_path_factory) -> SimpleNamespace:
    """A model that was quantized in memory, and the folder it was saved to."""
    name, how, preset_name = request.param
    source, wanted = open_source(folders[name]), recipe(preset_name, text, *how)
    problem, texts = resolve(source, wanted), gather(wanted, source)
    problem = problem.with_schemes(decide(problem, texts, None, Monitor(), "cpu").schemes)
    model = execute(problem, texts.calibration, None, Monitor(), "cpu").model
    folder = tmp_path_factory.mktemp("made")
    save_checkpoint(folder, model, problem)
    return SimpleNamespace(problem=problem, model=model, folder=folder)


def test_what_is_saved_comes_back_to_the_bit(made, tmp_path):
    outer = [scheme.weight for site, scheme in made.problem.weights() if site.kind != "linear"]
    assert len(outer) == 2 - made.problem.sites.tied
    assert all(outer)
    loaded = hf.load(made.folder, product="packed")
    want, got = (sample_logits(model) for model in (made.model, loaded))
    assert want.isfinite().all()
    assert float(kl_divergence(want, got).abs().max()) == 0.0
    (tmp_path / "again").mkdir()
    save_checkpoint(tmp_path / "again", loaded, made.problem)
    assert contents(tmp_path / "again") == contents(made.folder)


def test_transformers_own_door_gives_the_same_model(made):
    paley.register()
    stock = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    assert torch.equal(logits(stock), logits(paley.load(made.folder)))


def test_a_tied_head_has_the_codes_of_the_embedding(made):
    model: Any = paley.load(made.folder)
    head, embedding = model.lm_head, model.get_input_embeddings()
    assert isinstance(head, Coded)
    assert isinstance(embedding, Coded)
    tied = made.problem.sites.tied
    for part in ("codes", "scales"):
        assert (getattr(head, part).data_ptr() == getattr(embedding, part).data_ptr()) == tied
        assert (f"lm_head.{part}" in Checkpoint.open(made.folder)) != tied


def test_transformers_saves_it_again(made, tmp_path):
    loaded = hf.load(made.folder, product="dense")
    loaded.save_pretrained(tmp_path)
    assert torch.equal(logits(hf.load(tmp_path, product="dense")), logits(loaded))


PLAIN = [
    ("llama untied", FOLDED), ("llama untied", WIDER), ("llama untied", ONLINE), ("llama tied", WIDER),
    ("qwen2 tied", FOLDED), ("qwen2 tied", WIDER), ("qwen2 tied", ONLINE), ("gemma3 tied", ONLINE),
]  # fmt: skip


@pytest.mark.parametrize("name", ["w4a16", pytest.param("higgs-4e16h16", marks=pytest.mark.long)])
@pytest.mark.parametrize(("model", "how"), PLAIN)
def test_the_plain_checkpoint_predicts_the_same(model, how, name, folders, text, tmp_path):
    """Whatever turns: a pair between whose sides the stream turns is untied, every other one stays tied."""
    out = quantize(folders[model], recipe(name, text, "dtype=float32", *how), output=tmp_path / "out").output
    widened = model.endswith(" tied") and how == WIDER
    if widened:
        with pytest.raises(PaleyError, match=r"cannot leave out .* outside of 48 of the stream's 60 .*weights_only"):
            dequantize(out, output=tmp_path / "plain")
    dequantize(out, output=tmp_path / "plain", weights_only=widened)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    tied = model.endswith(" tied") and how == ONLINE
    assert config["tie_word_embeddings"] == tied
    plain = Checkpoint.open(tmp_path / "plain")
    assert (EMBEDDING in plain, HEAD in plain) == (True, not tied)
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    want = logits(paley.load(out, product="packed"))
    # What rounding puts outside of the original's directions counts in the plain final norm: little, but it does.
    assert (logits(stock) - want).norm() <= (5e-3 if widened else 1e-5) * want.norm()


SMALLER = [
    *(("qwen2 tied", name) for name in (*examples(), "w8a8kv8", "higgs-w8a16", "w4a16e16h16", "rtn-w8a8kv8")),
    *((model, name) for model in ("llama untied", "gemma3 tied") for name in ("w4a4kv4", "w8a8kv8", "higgs-4")),
]


@pytest.mark.parametrize(("model", "name"), SMALLER)
def test_no_preset_makes_a_file_larger(model, name, text, tmp_path, tiny_tokenizer):
    settings = MODELS[model][0] | {"intermediate_size": 64, "dtype": torch.bfloat16}
    folder = save_tiny(tmp_path / "model", tiny_tokenizer, **settings)
    results = quantize(folder, recipe(name, text), output=tmp_path / "out").results
    assert results.original_bytes == sum(i.nbytes for i in Checkpoint.open(folder).infos.values())
    assert results.bytes < results.original_bytes


def test_a_checkpoint_of_version_one_is_still_read(folders, text, tmp_path):
    """As the older Paley wrote it: no entries of embedding and head, which were never coded."""
    for name in ("llama untied", "qwen2 tied"):
        out = unseal(quantize(folders[name], recipe("higgs-4e16h16", text), output=tmp_path / name).output)
        want = logits(paley.load(out, product="dense"))
        config = json.loads((out / "config.json").read_text())
        section = config["quantization_config"]
        assert section["format_version"] == 4
        section["format_version"] = 1
        del section["linears"]["model.embed_tokens"]
        section["linears"].pop("lm_head", None)
        (out / "config.json").write_text(json.dumps(config))
        assert torch.equal(logits(paley.load(out, product="dense")), want)
        dequantize(out, output=tmp_path / f"{name} plain", dtype="float32")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{name} plain", dtype=torch.float32)
        assert (logits(plain) - want).norm() <= 1e-5 * want.norm()


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("model", "after"),
    [("llama untied", "embedding"), ("llama untied", "blocks"), ("llama untied", "head"), ("qwen2 tied", "embedding"),
     ("qwen2 tied", "block 0")],
)  # fmt: skip
def test_killed_between_two_steps_it_ends_in_the_same_bytes(model, after, folders, text, tmp_path, monkeypatch):
    wanted = recipe("w4a16e4h4", text)
    whole = contents(quantize(folders[model], wanted, output=tmp_path / "whole").output)
    steps: list[str] = []

    def watched(step: str, make: Any) -> Any:
        def run(self, *args: Any) -> Any:
            known = args[1] if step == "block" else args[0]
            name = f"{step} {args[0]}" if step == "block" else step
            if armed and name == {"embedding": "block 0", "block 0": "block 1", "blocks": "head"}.get(after):
                raise Killed
            steps.append(f"{name}{' known' if known else ''}")
            return make(self, *args)

        return run

    for step in ("embedding", "block", "head"):
        monkeypatch.setattr(ModelQuantizer, step, watched(step, getattr(ModelQuantizer, step)))

    def stop(*args: Any) -> None:
        raise Killed

    armed = True
    with monkeypatch.context() as patch:
        if after == "head":
            patch.setattr("paley.pipeline.run.save_checkpoint", stop)
        with pytest.raises(Killed):
            quantize(folders[model], wanted, output=tmp_path / "out")
    armed = False
    steps.clear()
    resumed = quantize(folders[model], wanted, output=tmp_path / "out", resume=True)
    left = {"embedding": ["block 0", "block 1", "head"], "block 0": ["block 1", "head"], "blocks": ["head"]}
    assert steps == ["embedding known", *left.get(after, ["head known"])]  # finished blocks are passed over
    assert contents(resumed.output) == whole


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "settings", "complaint"),
    [
        (
            "qwen2 tied", ("embedding=null",),
            r"lm_head: shares the weight of model\.embed_tokens \(tie_word_embeddings\), which this recipe keeps, so "
            r"it cannot have grid 'trellis6' of its own; set embedding to the same scheme, or head=null",
        ),
        (
            "gemma3 tied", ("overrides=[{pattern: lm_head, weight: {grid: int4}}]",),
            r"lm_head: shares .* has 'int4' and embedding 'trellis6'; set both to one of them",
        ),
        (
            "gemma3 tied", ("rotate=folded",),
            r"rotate=folded: .*the gain of post_attention_layernorm stands between .*; set rotate=online",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(model, settings, complaint, folders, text, tmp_path):
    with pytest.raises(PaleyError, match=complaint):
        quantize(folders[model], recipe("w4a16", text, *settings), output=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_may_follow_or_be_left_alone(folders, text):
    for settings in (("head=null",), ()):
        plan = make_plan(folders["qwen2 tied"], recipe("w4a16", text, *settings))
        assert plan.linears["model.embed_tokens"].weight is not None
        assert "lm_head" not in plan.linears


def test_codes_do_not_depend_on_the_bits_that_hold_the_model(text, tiny_tokenizer, tmp_path):
    """Files of 16 bits wait in 16 bits, but what is turned is float32: of an untied head, too."""
    half = save_tiny(tmp_path / "half", tiny_tokenizer, gains=True, dtype=torch.bfloat16)
    full = shutil.copytree(half, tmp_path / "full", ignore=shutil.ignore_patterns("*.safetensors*"))
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.float32).save_pretrained(full)
    wanted, made = recipe("w4a4kv4", text, *ONLINE, "dtype=bfloat16"), []
    for folder in (half, full):
        source = open_source(folder)
        problem = resolve(source, wanted)
        model = execute(problem, gather(wanted, source).calibration, None, Monitor(), "cpu").model
        made.append({name: t for name, t in model.state_dict().items() if name.endswith((".codes", ".scales"))})
    assert "lm_head.codes" in made[0]
    assert {name: t for name, t in made[0].items() if not torch.equal(t, made[1][name])} == {}
