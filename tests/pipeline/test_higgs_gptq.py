"""GPTQ behind Hadamard blocks: its second moments are those of the inputs that the blocks have turned."""

import functools
import random
import string

import pytest
import torch
from transformers import AutoModelForCausalLM

import paley
from paley.model.capture import capture_inputs
from paley.model.linear import QuantLinear
from paley.pipeline import quantize
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

LOUD = [3, 4, 21, 40]  # columns of each linear's input, 30 times as loud as the others
IDS = torch.randint(4, 260, (8, 64), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_tokenizer):
    """Two layers in which every linear reads columns of unequal energy, as those of real models do."""
    folder = tmp_path_factory.mktemp("model")
    plain = save_tiny(folder / "plain", tiny_tokenizer, intermediate_size=64, num_key_value_heads=4)
    loud = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():
        for layer in loud.model.layers:
            for gain in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight):
                gain[LOUD] *= 30
            for writer in (layer.self_attn.v_proj.weight, layer.mlp.up_proj.weight):
                writer[LOUD] *= 30
    loud.save_pretrained(folder / "loud")
    tiny_tokenizer.save_pretrained(folder / "loud")
    return folder / "loud"


@pytest.fixture(scope="module")
def higgs(model, tmp_path_factory):
    """-> what makes the model by `higgs-3` with further settings, once for all tests."""
    folder, rng = tmp_path_factory.mktemp("made"), random.Random(0)
    letters = string.ascii_letters + string.digits + string.punctuation
    text = folder / "text.txt"
    text.write_text("\n<|endoftext|>\n".join("".join(rng.choices(letters, k=200)) for _ in range(80)))
    sizes = [f"{part}.{size}" for part in ("calibration", "search", "test") for size in ("sequences=16", "seq_len=64")]

    @functools.cache
    def make(*settings):
        made = apply_settings(preset("higgs-3e16h16"), [f"calibration.source={text}", "hadamard=16", *sizes, *settings])
        return quantize(model, made, output=folder / ",".join(settings))

    return make


def test_feedback_lowers_kl(higgs):
    nearest, gptq = (higgs(f"weights.method={method}").results.evaluation.kl for method in ("nearest", "gptq"))
    assert gptq < 0.5 * nearest


def test_feedback_lowers_the_error_of_every_linear(model, higgs):
    """Each on the inputs that the quantized model gives it, which is what `compensate=plain` minimizes."""
    original = AutoModelForCausalLM.from_pretrained(model)
    gptq, nearest = (
        paley.load(higgs(*settings).output)
        for settings in (("weights.method=gptq", "compensate=plain"), ("weights.method=nearest",))
    )
    inputs = {}
    linears = {name: m for name, m in gptq.named_modules() if isinstance(m, QuantLinear) and m.scheme.weight}
    with torch.no_grad():
        with capture_inputs(linears, inputs.__setitem__):
            gptq(IDS)
        assert len(inputs) == 14
        for name, x in inputs.items():
            want, by_feedback, alone = (model.get_submodule(name)(x) for model in (original, gptq, nearest))
            assert (by_feedback - want).square().sum() < 0.25 * (alone - want).square().sum(), name
