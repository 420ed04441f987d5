"""What users run into with a model that is otherwise in order: extreme weights and losses, lengths, comparisons."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

import paley
from every_type import tiny_model
from paley import hf
from paley.core.errors import PaleyError
from paley.pipeline import Monitor, quantize
from paley.pipeline.score import scored_text
from paley.recipe import apply_settings
from tiny_models import EMBEDDING, change_config, change_tensors, higgs, save_tiny

IDS = torch.tensor([[7, 19, 250, 33, 8]])
V, O = "model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj.weight"  # noqa: E741
ROUNDED = ("inputs={grid: int4}", "keys={grid: int4}", "values={grid: int4}")


class Notes(Monitor):
    def __init__(self):
        self.notes = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    return save_tiny(tmp_path / "model", tiny_tokenizer, dtype=torch.bfloat16)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("three bits are enough for anybody\n\n" * 400)
    return file


def scored_on(text, *settings):
    return apply_settings(higgs(), [f"test={{source: {text}, sequences: 2}}", *settings])


# --- scales beyond float16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["higgs-3", "higgs-4", "rtn-w4a16", "w4a16", "rtn-w2a16"])
@pytest.mark.parametrize(
    ("factors", "named"),
    [({V: 1e-9}, V), ({V: 1e8, O: 1e-8}, V), ({O: 1e-8}, O), ({V: 1e-7}, V), ({V: 1e-30}, V), ({V: 1e25}, V)],
)
def test_a_layer_without_room_in_float16_is_refused_by_name(folder, text, tmp_path, preset, factors, named):
    change_tensors(folder, lambda ts: ts | {name: (ts[name].float() * f).bfloat16() for name, f in factors.items()})
    settings = ["test=null", "search.method=none", "hadamard=16", "fit_groups=true"]
    settings += [f"calibration={{source: {text}, sequences: 2, seq_len: 16}}", "dtype=float32"]
    with pytest.raises(PaleyError, match=rf"{named.removesuffix('.weight')}: .*float16 has no room for its scales"):
        quantize(folder, apply_settings(paley.preset(preset), settings), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_rows_that_are_as_good_as_zero_are_not(folder, tmp_path):
    def change(tensors):
        tensors[V][3:5] = 1e-12
        tensors["model.embed_tokens.weight"][7] = 0
        return tensors

    change_tensors(folder, change)
    out = quantize(folder, higgs(name="higgs-4"), output=tmp_path / "out").output
    assert paley.load(out)(IDS).logits.isfinite().all()


def test_large_and_small_layers_within_float16_keep_the_grids_error(folder, tmp_path):
    plain = quantize(folder, higgs(), output=tmp_path / "a").results.layers
    change_tensors(folder, lambda ts: ts | {V: ts[V] * 2.0**12, O: ts[O] * 2.0**-8})
    scaled = quantize(folder, higgs("dtype=float32"), output=tmp_path / "b").results.layers
    for name in plain:
        assert scaled[name].rel_error == pytest.approx(plain[name].rel_error, rel=0.01)


def test_a_layer_that_is_changed_beyond_what_it_was_is_told(folder, text, tmp_path):
    """GPTQ makes up there for what other layers lose, here of an embedding before which all else is small."""
    settings = ["test=null", "search.method=none", "hadamard=16", "fit_groups=true", "dtype=float32"]
    settings += [f"calibration={{source: {text}, sequences: 2, seq_len: 32}}"]
    recipe = apply_settings(paley.preset("w4a16"), settings)
    notes = Notes()
    quantize(folder, recipe, output=tmp_path / "plain", monitor=notes)
    assert not any("changed by more" in note for note in notes.notes)
    change_tensors(folder, lambda ts: ts | {EMBEDDING: ts[EMBEDDING] * 1e5})
    made = quantize(folder, recipe, output=tmp_path / "out", monitor=notes)
    (said,) = [note for note in notes.notes if "changed by more" in note]
    assert all(name in said or "more kinds" in said or "tensors" in said for name, layer in made.results.layers.items()
               if layer.rel_error > 1)  # fmt: skip


# --- losses ---------------------------------------------------------------------------------------------------------


def test_a_loss_beyond_what_exp_can_take_is_published(folder, text, tmp_path):
    change_tensors(folder, lambda ts: ts | {"model.norm.weight": ts["model.norm.weight"] * 1e5})
    outcome = quantize(folder, scored_on(text, "test.seq_len=32", "dtype=float32"), output=tmp_path / "out")
    measured = outcome.results.evaluation
    assert measured.nll > 709
    assert measured.reference_nll > 709
    assert measured.perplexity == float("inf")
    assert "inf" in (outcome.output / "README.md").read_text()
    assert paley.score(outcome.output, folder).nll == measured.nll


# --- lengths -----------------------------------------------------------------------------------------------------


def test_default_lengths_follow_the_models_context(folder, text, tmp_path):
    change_config(folder, max_position_embeddings=48)
    notes = Notes()
    out = quantize(folder, scored_on(text), output=tmp_path / "out", monitor=notes)
    assert out.plan.recipe.test.seq_len == 48
    assert out.results.evaluation.tokens == 2 * 47
    assert any("sequences of 48 tokens (test)" in note for note in notes.notes)
    change_config(folder, model_type="llama")
    plain = Notes()
    assert paley.score(folder, data=str(text), sequences=2, monitor=plain).tokens == 2 * 47
    assert any("sequences of 48 tokens" in note for note in plain.notes)


@pytest.mark.parametrize("source", ["text", "random"])
def test_sensitivities_follow_it_too(folder, text, source):
    change_config(folder, max_position_embeddings=48)
    notes = Notes()
    settings = {"source": str(text) if source == "text" else source, "sequences": 1, "levels": 3, "monitor": notes}
    found = paley.measure_sensitivity(folder, **settings)
    assert found.text.tokens == 48
    assert "sequences of 48 tokens, as this model reads no more" in notes.notes
    with pytest.raises(PaleyError, match="seq_len=49: this model reads"):
        paley.measure_sensitivity(folder, seq_len=49, **settings)


@pytest.mark.parametrize(
    ("kind", "key", "complaint"),
    [("gpt2", "n_positions", "max_position_embeddings"), ("mpt", "max_seq_len", "max_seq_len"),
     ("whisper", "max_target_positions", "max_target_positions"), ("opt", "max_position_embeddings", "max_pos")],
)  # fmt: skip
def test_contexts_by_other_names_are_followed(tmp_path, text, tiny_tokenizer, kind, key, complaint):
    """Beyond them there are no positions, and a forward fails."""
    folder = tmp_path / "model"
    model = tiny_model(kind, **{key: 24, "vocab_size": 260})
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    notes = Notes()
    made = quantize(folder, scored_on(text), output=tmp_path / "out", monitor=notes)
    assert made.plan.recipe.test.seq_len == 24
    assert made.results.evaluation.tokens == 2 * 23
    assert any("sequences of 24 tokens (test)" in note for note in notes.notes)
    with pytest.raises(PaleyError, match=rf"seq_len=25: this model reads sequences of at most 24 tokens \({complaint}"):
        paley.score(folder, data=str(text), seq_len=25)


def test_a_calibrated_run_follows_it_too(folder, text, tmp_path):
    change_config(folder, max_position_embeddings=48)
    settings = ["search.method=none", "hadamard=16", "fit_groups=true", f"calibration={{source: {text}, sequences: 2}}"]
    notes = Notes()
    outcome = quantize(
        folder, apply_settings(paley.preset("w4a16"), [*settings, "test=null"]), output=tmp_path / "out", monitor=notes
    )
    assert outcome.plan.recipe.calibration.seq_len == 48
    assert any("(calibration)" in note for note in notes.notes)


def test_a_length_that_was_given_is_refused_beyond_it(folder, text, tmp_path):
    change_config(folder, max_position_embeddings=48)
    with pytest.raises(PaleyError, match=r"test\.seq_len=49: this model reads sequences of at most 48 tokens"):
        quantize(folder, scored_on(text, "test.seq_len=49"), output=tmp_path / "out")
    with pytest.raises(PaleyError, match="seq_len=49: this model reads"):
        paley.score(folder, data=str(text), seq_len=49)


# --- comparisons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
def test_another_model_is_no_original(folder, text, tmp_path, tiny_tokenizer, plain):
    out = quantize(folder, higgs(), output=tmp_path / "out").output
    if plain:
        out = paley.dequantize(out, output=tmp_path / "plain").output
    other = save_tiny(tmp_path / "other", tiny_tokenizer, dtype=torch.bfloat16, intermediate_size=40)
    with pytest.raises(PaleyError, match=r"was made from a model with fingerprint .*; compare with the model"):
        paley.score(out, other, data=str(text), sequences=2, seq_len=16)
    assert paley.score(out, folder, data=str(text), sequences=2, seq_len=16).kl is not None
    assert paley.score(folder, other, data=str(text), sequences=2, seq_len=16).kl is not None  # no plan, no claim


def test_a_text_that_is_elsewhere_is_asked_for_and_its_path_is_not_published(folder, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = quantize(folder, scored_on("text.txt", "test.seq_len=16"), output=tmp_path / "out").output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert paley.score(out).tokens == 30  # found from the folder
    text = text.rename(tmp_path / "elsewhere" / "text.txt")
    for reader in (paley.score, lambda out: scored_text(out, None, None, None, Monitor())):  # as a report reads it
        with pytest.raises(PaleyError, match=r"the text \.\./text\.txt that .* is not here; give its path with data$"):
            reader(out)
    assert paley.score(out, data=str(text)).tokens == 30
    absolute = quantize(folder, scored_on(text, "test.seq_len=16"), output=tmp_path / "absolute").output
    card = (absolute / "README.md").read_text()
    assert "`text.txt`" in card
    assert str(tmp_path) not in card


# --- attention ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("asked", ["eager", "sdpa", "flash_attention_2", {"": "eager"}, {"text_config": {"": "sdpa"}}])
def test_the_attention_of_a_loaded_model_stays(folder, tmp_path, asked):
    out = quantize(folder, higgs(*ROUNDED[1:]), output=tmp_path / "out").output
    model = paley.load(out)
    expected = model(IDS).logits
    for part in (model, model.model):
        with pytest.raises(PaleyError, match="would not round keys and values as this checkpoint wants"):
            part.set_attn_implementation(asked)
    model.set_attn_implementation("paley")
    assert torch.equal(model(IDS).logits, expected)


@torch.no_grad()
def test_nor_can_it_be_changed_in_the_config(folder, tmp_path):
    model = paley.load(quantize(folder, higgs(ROUNDED[2]), output=tmp_path / "out").output)
    model.config._attn_implementation = "eager"
    with pytest.raises(PaleyError, match="would not round keys and values"):
        model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("asked", ["eager", "sdpa"])
def test_without_a_quantized_cache_any_attention_will_do(folder, tmp_path, asked):
    out = quantize(folder, higgs(ROUNDED[0]), output=tmp_path / "out").output
    assert json.loads((out / "config.json").read_text())["quantization_config"]["attentions"]
    hf.register()
    expected = paley.load(out)(IDS).logits
    model = AutoModelForCausalLM.from_pretrained(out, attn_implementation=asked, dtype=torch.float32)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)
    model = paley.load(out)
    model.set_attn_implementation(asked)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [(), ROUNDED])
def test_a_model_without_its_head_is_refused(folder, tmp_path, settings):
    out = quantize(folder, higgs(*settings), output=tmp_path / "out").output
    hf.register()
    with pytest.raises(PaleyError, match=r"LlamaModel has no head: load .* AutoModelForCausalLM"):
        AutoModel.from_pretrained(out)


# --- one folder, two types -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [(), ROUNDED])
def test_what_16_bits_do_to_rounded_inputs_is_told(folder, tmp_path, caplog, settings):
    out = quantize(folder, higgs(*settings), output=tmp_path / "out").output
    hf.register()
    with caplog.at_level(logging.WARNING, "paley.hf"):
        model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert ("measured in float32" in caplog.text) == bool(settings)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "paley.hf"), torch.no_grad():
        same = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
        assert torch.equal(same, paley.load(out)(IDS).logits)
    assert caplog.text == ""
    card = (out / "README.md").read_text()
    assert "dtype=torch.float32" in card
    assert ("its predictions differ" in card) == bool(settings)


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_is_to_be_merged_first(folder, weights, beside):
    """Whoever reads it; trainers save config and tokenizer beside it, or not."""
    for file in folder.iterdir():
        if not beside or "model" in file.name:
            file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / weights).write_bytes(b"")
    out = folder.with_name("out")
    for use in (
        lambda: quantize(folder, higgs(), output=out), lambda: paley.generate(folder, "a"), lambda: paley.load(folder),
        lambda: paley.score(folder, data="pydoc"), lambda: paley.inspect(folder), lambda: paley.doctor(folder),
    ):  # fmt: skip
        with pytest.raises(PaleyError, match=r"is an adapter .*merge_and_unload\(\)"):
            use()


def test_a_tokenizer_that_is_missing_is_told_in_one_line(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(PaleyError, match="no tokenizer can be loaded here") as caught:
        paley.generate(folder, "a")
    assert "\n" not in str(caught.value)


# --- compilation ------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "product", ["auto", pytest.param("dense", marks=pytest.mark.long), pytest.param("packed", marks=pytest.mark.long)]
)
def test_a_compiled_model_computes_the_same(folder, tmp_path, product):
    """What cannot be traced is left out of the graphs; `eager` compiles nothing, and so takes no C++ compiler."""
    out = quantize(folder, higgs(*ROUNDED), output=tmp_path / "out").output
    model = paley.load(out, product=product)
    expected = model(IDS).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(IDS).logits, expected)
    ids = compiled.generate(IDS, max_new_tokens=4, do_sample=False, cache=paley.PackedKVCache(model))
    assert ids.shape[1] == IDS.shape[1] + 4
