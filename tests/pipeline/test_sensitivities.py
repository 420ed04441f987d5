"""Measuring a checkpoint: what is measured on what, and that a stopped run ends as an unstopped one."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from paley.core.errors import PaleyError
from paley.methods.sensitivity import fit_slope
from paley.model.loading import open_source
from paley.model.sensitivity import NoiseProbe
from paley.pipeline.monitor import Monitor
from paley.pipeline.sensitivities import measure_sensitivity, random_ids

SMALL = {"source": "random", "sequences": 2, "seq_len": 24, "method": "noise"}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tiny_tokenizer, tmp_path_factory) -> SimpleNamespace:
    """A model of two layers whose norms have gains, and a text."""
    folder = tmp_path_factory.mktemp("sensitivities")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        pad_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = torch.rand_like(parameter) * 2
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join(f"Story {n} of {n * n} things. " * 3 for n in range(60)))
    return SimpleNamespace(model=folder / "model", text=text)


class Seen(Monitor):
    def __init__(self):
        self.stages, self.steps = [], []

    def stage(self, name, total):
        self.stages.append((name, total))

    def step(self, detail=""):
        self.steps.append(detail)


@pytest.fixture(scope="module")
def whole(made):
    return measure_sensitivity(made.model, **SMALL)


def test_what_comes_out(made, whole):
    monitor = Seen()
    assert measure_sensitivity(made.model, **SMALL, monitor=monitor) == whole
    assert (whole.metric, whole.baseline, whole.folded) == ("kl", 0.0, False)
    assert (whole.text.source, whole.text.tokens) == ("random", 48)
    assert whole.fingerprint == open_source(made.model).fingerprint
    assert len(whole.slots) == 14 + 1  # a tied pair is one weight
    for slot in whole.slots.values():
        assert slot.alpha == pytest.approx(fit_slope(slot.levels).alpha)
        assert slot.kind == "weight"
    trials = sum(len(slot.levels) for slot in whole.slots.values())
    assert sum(total for _, total in monitor.stages) == len(monitor.steps) == trials + 1
    assert monitor.stages[:2] == [("checking the checkpoint", 1), ("measuring sensitivities", 15 * 4)]


def test_activations_do_not_change_the_weights_slopes(made, whole):
    more = measure_sensitivity(made.model, **SMALL, kinds=("weight", "input", "keys", "values"))
    assert len(more.slots) == 15 + 2 * (4 + 1 + 1)
    first = {name: dict(slot.levels) for name, slot in whole.slots.items()}
    for name, levels in first.items():
        both = levels.keys() & dict(more.slots[name].levels).keys()
        assert len(both) >= 4
        assert all(levels[t2] == dict(more.slots[name].levels)[t2] for t2 in both)


def test_folding_matters_where_a_gain_is_folded_in(made, whole):
    folded = measure_sensitivity(open_source(made.model), **SMALL, fold=True)
    assert folded.folded
    # Equal but for the rows that R1 mixes, and for how many draws either needed.
    assert folded.slots[DOWN].alpha == pytest.approx(whole.slots[DOWN].alpha, abs=whole.slots[DOWN].stderr)
    up = "model.layers.1.mlp.up_proj"
    assert folded.slots[up].alpha != pytest.approx(whole.slots[up].alpha, abs=2 * whole.slots[up].stderr)


def test_perplexity_on_a_text(made):
    found = measure_sensitivity(
        made.model, metric="perplexity", source=str(made.text), sequences=2, seq_len=24, levels=3
    )
    assert found.baseline > 1
    assert found.text.source == str(made.text)
    assert all(len(slot.levels) <= 3 for slot in found.slots.values())


def test_text_that_the_model_samples(made):
    found = measure_sensitivity(made.model, source="self", sequences=2, seq_len=12, levels=3)
    assert (found.text.source, found.text.tokens) == ("self", 24)


class Killed(Exception):  # noqa: N818
    pass


@pytest.mark.parametrize("cut", [0, 7])
def test_a_killed_run_loses_one_trial_and_ends_the_same(made, whole, tmp_path, monkeypatch, cut):
    file, calls = tmp_path / "a.partial.jsonl", []
    delta = NoiseProbe.delta

    def counted(self, slot, t, draw):
        calls.append((slot, draw))
        if len(calls) == 30:
            raise Killed
        return delta(self, slot, t, draw)

    monkeypatch.setattr(NoiseProbe, "delta", counted)
    with pytest.raises(Killed):
        measure_sensitivity(made.model, **SMALL, progress_file=file)
    assert len(file.read_text().splitlines()) == 1 + 29
    if cut:  # killed while it wrote
        file.write_bytes(file.read_bytes()[:-cut])
    done = 29 - bool(cut)
    assert measure_sensitivity(made.model, **SMALL, progress_file=file) == whole
    trials = sum(len(slot.levels) for slot in whole.slots.values())
    assert len(calls) == 30 + trials - done
    measure_sensitivity(made.model, **SMALL, progress_file=file)
    assert len(calls) == 30 + trials - done  # all known


def test_progress_of_other_settings_is_refused(made, tmp_path):
    file = tmp_path / "a.partial.jsonl"
    measure_sensitivity(made.model, **SMALL, progress_file=file, levels=3)
    before = file.read_bytes()
    for other in ({"seed": 1}, {"levels": 4}, {"fold": True}, {"seq_len": 20}):
        with pytest.raises(PaleyError, match=r"a\.partial\.jsonl: the unfinished measurement there is of another"):
            measure_sensitivity(made.model, **(SMALL | {"levels": 3} | other), progress_file=file)
    assert file.read_bytes() == before


def test_damaged_progress_is_refused(made, tmp_path):
    file = tmp_path / "a.partial.jsonl"
    for text in ("no json\n", '{"a": 1}\n{"slot": "x"}\n', "[]\n3\n"):
        file.write_text(text)
        with pytest.raises(PaleyError, match=r"a\.partial\.jsonl: is damaged"):
            measure_sensitivity(made.model, **SMALL, progress_file=file)
    with pytest.raises(PaleyError, match="cannot be written"):
        measure_sensitivity(made.model, **SMALL, progress_file=tmp_path)


def test_random_tokens(made):
    source = open_source(made.model)
    ids = random_ids(source.tokenizer(), source, 40, 50, 3)
    assert ids.shape == (40, 50)
    assert (ids[:, 0] == 1).all()
    assert int(ids.max()) == 259  # of the tokenizer's 260; the embedding has 264 rows
    assert torch.equal(ids, random_ids(source.tokenizer(), source, 40, 50, 3))
    assert json.dumps(ids[:2].tolist()) != json.dumps(random_ids(source.tokenizer(), source, 2, 50, 4).tolist())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"metric": "perplexity", "source": "random"}, "perplexity of random tokens means nothing; use metric kl"),
        ({"source": "random", "seq_len": 1}, "seq_len >= 2"),
        ({"source": "no.txt", "seq_len": 8}, "no.txt: no such text file"),
        ({"source": "random", "seq_len": 129}, "^seq_len=129: this model reads sequences of at most 128"),
        ({"levels": 2}, "at least 3 noise levels"),
        ({"source": "random", "kinds": ["bias"], "seq_len": 8}, "unknown kind 'bias'"),
    ],
)
def test_bad_settings(made, settings, complaint):
    with pytest.raises(PaleyError, match=complaint):
        measure_sensitivity(made.model, **settings)
