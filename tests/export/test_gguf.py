"""GGUF files: llama.cpp reads them, says what our decoder says, and has the same weights to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import paley
from command_line import paley_
from gguf_models import (
    EXPERTS,
    FAMILIES,
    LINEAR,
    LLAMA3,
    SIZES,
    YARN,
    byte_tokenizer,
    expert_of,
    file_of,
    quantized,
    save,
    sentencepiece,
)
from llama_cpp import open_llama_cpp
from paley.core.errors import PaleyError
from paley.export.gguf import export_gguf
from paley.format.checkpoint import Checkpoint
from paley.model.loading import open_source, read_config
from tiny_models import change_config, unseal

gguf = pytest.importorskip("gguf")

DEMO = Path(__file__).parents[2] / "assets" / "demo-model"
TEXT = "Once upon a time, there were 12 girls' toys.\n\nThey <b>said</b>: \"It's\tlate!\" héllo"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def kl(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    p, q = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, *EXPERTS])
def test_llama_cpp_says_the_same(family, tokenizer, tmp_path):
    # This llama.cpp scales the whole stream where Granite scales what is added to it (findings).
    changes = {"residual_multiplier": 1.0} if family == "granite" else {}
    out = quantized(save(tmp_path / "model", tokenizer, family, **changes), tmp_path / "out", name="gguf-q8_0")
    made = export_gguf(out, output=tmp_path / "gguf")
    ids = torch.randint(3, 250, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    model = paley.load(out, product="dense")
    if family == "mixtral":
        _add_to_what_experts_read_(model)
    ours = model(torch.tensor([ids]), use_cache=False).logits[0]
    with open_llama_cpp(file_of(made.output)) as peer:
        theirs = peer.logits(ids)
        assert theirs.shape == ours.shape
        # What linears read is rounded to 8 bits there. Rows of queries in another order would be off by their norm.
        assert (theirs - ours).norm() < 0.1 * ours.norm()
        assert kl(ours, theirs) < 0.02


def _add_to_what_experts_read_(model) -> None:
    """As this llama.cpp computes Mixtral (findings): the experts' output is added to the norm's, not to the stream."""
    for block in model.model.layers:
        seen = {}
        norm = block.post_attention_layernorm
        norm.register_forward_hook(lambda _, read, made, seen=seen: seen.update(off=made - read[0]))
        block.register_forward_hook(lambda _, read, made, seen=seen: made + seen["off"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gguf-q4_0", "gguf-q4_1", "gguf-q5_0", "gguf-q5_1", "gguf-q8_0"])
def test_each_type_holds_the_weights_to_the_bit(name, tokenizer, tmp_path):
    model = save(tmp_path / "model", tokenizer, "llama")
    out = quantized(model, tmp_path / "out", name=name)
    made = export_gguf(out, output=tmp_path / "gguf")
    kind = name.removeprefix("gguf-").upper()
    assert made.types == ({"Q8_0": 23, "F32": 7} if kind == "Q8_0" else {kind: 21, "Q8_0": 2, "F32": 7})
    assert file_of(made.output).name == f"model-{kind}.gguf"
    tolerance = 2**-10 if kind.endswith("_1") else 0.0
    assert bool(made.notes) == bool(tolerance)
    paley.dequantize(out, output=tmp_path / "plain", dtype="float32")
    plain = Checkpoint.open(tmp_path / "plain")
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file_of(made.output)).tensors}

    def theirs(name: str) -> torch.Tensor:
        return torch.from_numpy(gguf.dequantize(found[name].data, found[name].tensor_type).copy())

    keys = theirs("blk.1.attn_k.weight").unflatten(0, (2, 16, 2)).transpose(1, 2).flatten(0, 2)
    for weight, name in (
        (theirs("blk.1.ffn_down.weight"), "mlp.down_proj"),
        (keys, "self_attn.k_proj"),  # values i and i + 16 of a head are neighbours there
    ):
        ours = plain[f"model.layers.1.{name}.weight"]
        assert (weight - ours).abs().max() <= tolerance * ours.abs().max()
    assert made.bytes < Checkpoint.open(model).nbytes


def test_a_real_model_writes_the_same_text(tmp_path):
    quick = ("weights.grid=int4", "weights.scale_search=absmax")
    out = quantized(DEMO, tmp_path / "out", *quick)
    made = export_gguf(out, output=tmp_path / "gguf")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("The function returns")["input_ids"]
    model = paley.load(out, product="dense")
    with open_llama_cpp(file_of(made.output)) as peer, torch.no_grad():
        assert peer.tokens("The function returns") == ids
        assert kl(model(torch.tensor([ids]), use_cache=False).logits[0], peer.logits(ids)) < 2e-3
        want = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert peer.greedy(ids, 6) == want[0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_text_becomes_the_same_tokens(kind, tokenizer, tmp_path):
    tokenizer = tokenizer if kind == "bytes" else sentencepiece()
    out = quantized(save(tmp_path / "model", tokenizer, "llama", vocab_size=400), tmp_path / "out")
    made = export_gguf(out, output=tmp_path / "gguf")
    fields = gguf.GGUFReader(file_of(made.output)).fields
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types[:4] == [3, 3, 3, 3] if kind == "bytes" else [2, 3, 3, 3]
    if kind == "bytes":
        assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template
        assert fields["tokenizer.ggml.tokens"].contents()[265:267] == ["<b>", "[PAD266]"]
        assert types[264:267] == [1, 4, 5]
    with open_llama_cpp(file_of(made.output)) as peer:
        for text in (TEXT, "the other one on a theatre", " two  spaces", "</s> then <s>the"):
            assert peer.tokens(text) == tokenizer(text)["input_ids"], text


def test_llama3_scaling_divides_each_frequency(tokenizer, tmp_path):
    """As a tensor of factors: those that transformers' own frequencies have been divided by."""
    model = save(tmp_path / "model", tokenizer, "llama", rope_parameters=LLAMA3)
    made = export_gguf(quantized(model, tmp_path / "out"), output=tmp_path / "gguf")
    rotary = AutoModelForCausalLM.from_pretrained(model).model.rotary_emb
    plain = LLAMA3["rope_theta"] ** -(torch.arange(16) / 16)
    (factors,) = [t for t in gguf.GGUFReader(file_of(made.output)).tensors if t.name == "rope_freqs.weight"]
    assert torch.allclose(torch.from_numpy(factors.data.copy()), plain / rotary.inv_freq, rtol=1e-5)


def test_layers_that_are_kept_and_weights_alone(tokenizer, tmp_path):
    model = save(tmp_path / "model", tokenizer, "qwen2", intermediate_size=264)
    keep = 'overrides=[{pattern: "*.down_proj", keep: true}]'
    out = quantized(model, tmp_path / "out", keep, "inputs={grid: int8}", "dtype=bfloat16")
    with pytest.raises(PaleyError, match="GGUF file cannot round what this model rounds as it runs: 18 linear"):
        export_gguf(out, output=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()
    made = export_gguf(out, output=tmp_path / "gguf", weights_only=True)
    assert made.dropped == ("rounding of 18 linear inputs to int8",)
    assert made.types["BF16"] == 3
    assert "Left out: rounding of 18 linear inputs to int8" in (made.output / "README.md").read_text()


@pytest.mark.parametrize("family", EXPERTS)
def test_experts(family, tokenizer, tmp_path):
    """Stacks of gate and up come apart; a file with experts is written, but not read."""
    out = quantized(save(tmp_path / "model", tokenizer, family), tmp_path / "out")
    file = file_of(export_gguf(out, output=tmp_path / "gguf").output)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    plain = Checkpoint.open(paley.dequantize(out, output=tmp_path / "plain", dtype="float32").output)
    for part, name in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
        theirs = found[f"blk.1.ffn_{part}_exps.weight"]
        stack = torch.from_numpy(gguf.dequantize(theirs.data, theirs.tensor_type).copy())
        for expert in range(4):
            assert torch.equal(stack[expert], expert_of(plain, expert, name)), (part, expert)
    assert found["blk.1.ffn_gate_inp.weight"].tensor_type.name == "F32"
    with pytest.raises(PaleyError, match="has experts, which Paley writes to GGUF but does not read"):
        open_source(file)


def test_experts_whose_shares_do_not_add_up_to_one_are_refused(tokenizer, tmp_path):
    changed = save(tmp_path / "changed", tokenizer, "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(PaleyError, match="can only have norm_topk_prob True, got False"):
        export_gguf(quantized(changed, tmp_path / "out changed"), output=tmp_path / "no")


REFUSED = {
    "rotated": (("rotate=online",), r"its input turns at run time, which GGUF cannot say; .*gguf-q4_0"),
    "grid": (("weights.grid=gauss4", "weights.scale_search=mse"), r"no type of GGUF holds grid 'gauss4'; the nearest"),
    "vectors": (("weights.grid=p2n256", "weights.scale_search=rms"), r"no type of GGUF holds grid 'p2n256'"),
    "group": (("weights.group_size=16",), r"groups of a multiple of 32 columns, got group_size=16"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_gguf_cannot_hold_is_refused_before_any_work(why, tokenizer, tmp_path):
    settings, complaint = REFUSED[why]
    out = quantized(save(tmp_path / "model", tokenizer, "llama"), tmp_path / "out", *settings)
    with pytest.raises(PaleyError, match=complaint):
        export_gguf(out, output=tmp_path / "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_models_that_a_file_cannot_describe_are_refused(tokenizer, tmp_path):
    for family, changes, complaint in [
        ("mistral", {"sliding_window": 8}, r"can only have sliding_window in layers none, got in layers 0, 1, 2"),
        ("gemma3_text", {"query_pre_attn_scalar": 20}, "can only have attention scale"),
        ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}, "no_rope_layers in layers 0, 1, 2, got in layers 0, 2"),
        ("llama", {"hidden_act": "gelu"}, "can only have hidden_act silu, got gelu"),
        ("qwen2", {"head_dim": 16}, "can only have head_dim 32, got 16"),
        ("llama", {"mlp_bias": True}, "GGUF has no place for this bias"),
        ("llama", {"rope_parameters": LINEAR | {"rope_type": "dynamic"}}, "llama3 or yarn, got dynamic"),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "attention_factor 1.13863, got 1.5"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16}}, "beta_fast 32, got 16"),
    ]:
        model = save(tmp_path / f"{family}{complaint[-8:]}", tokenizer, family, **changes)
        out = quantized(model, tmp_path / f"out {model.name}")
        with pytest.raises(PaleyError, match=complaint):
            export_gguf(out, output=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_family_without_gguf_names_those_that_have(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = transformers.Olmo2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = quantized(tmp_path / "model", tmp_path / "out")
    with pytest.raises(PaleyError, match=r"'olmo2' cannot be a GGUF file; those that can are llama, mistral"):
        export_gguf(out, output=tmp_path / "gguf")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tmp_path, tiny_tokenizer, tokenizer):
    out = quantized(save(tmp_path / "model", tiny_tokenizer, "llama"), tmp_path / "out")
    with pytest.raises(PaleyError, match=r"that Paley has no name of llama.cpp for; known are gpt-2, smollm"):
        export_gguf(out, output=tmp_path / "gguf")
    many = save(tmp_path / "many", tokenizer, "llama", vocab_size=200)
    with pytest.raises(PaleyError, match="a piece of id 265, but the embedding has 200 rows"):
        export_gguf(quantized(many, tmp_path / "out many"), output=tmp_path / "gguf")
    assert not (tmp_path / "gguf").exists()


def test_a_damaged_folder_is_refused(tokenizer, tmp_path):
    out = quantized(save(tmp_path / "model", tokenizer, "llama"), tmp_path / "out")
    change_config(out, rms_norm_eps=0.5)
    with pytest.raises(PaleyError, match="rms_norm_eps"):
        export_gguf(out, output=tmp_path / "gguf")
    unseal(out)
    change_config(out, hidden_act="gelu")
    assert read_config(out).hidden_act == "gelu"
    with pytest.raises(PaleyError, match="can only have hidden_act silu"):
        export_gguf(out, output=tmp_path / "gguf")


def test_the_command_line_and_overwriting(tokenizer, tmp_path):
    out = quantized(save(tmp_path / "model", tokenizer, "llama"), tmp_path / "out", name="gguf-q4_0")
    args = ["export", out, "--to", "gguf", "--output", tmp_path / "gguf"]
    shown = paley_(*args).out
    assert "tensors: Q4_0 × 21, F32 × 7, Q8_0 × 2" in shown
    assert "exists already" in paley_(*args, code=2).err
    found = json.loads(paley_(*args, "--overwrite", "--json").out)
    assert found["types"] == {"Q4_0": 21, "Q8_0": 2, "F32": 7}
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == [
        "README.md", "model-Q4_0.gguf", "results.json",
    ]  # fmt: skip
    assert (
        "--to: must be gguf, compressed-tensors, mlx, plain, got 'ggfu'; did you mean 'gguf'?"
        in paley_("export", out, "--to", "ggfu", "--output", "x", code=2).err
    )
    plain = json.loads(paley_("export", out, "--to", "plain", "--output", tmp_path / "plain", "--json").out)
    assert plain["types"] == {}
    assert Checkpoint.open(tmp_path / "plain").nbytes == plain["bytes"]


def test_bad_input_is_one_line_and_nothing_half_written(tokenizer, tmp_path):
    """Of the command line: a rotated folder, a damaged one, one of a rounded input, and GGUF files that are none."""
    model = save(tmp_path / "model", tokenizer, "llama")
    rotated = quantized(model, tmp_path / "rotated", "rotate=online")
    damaged = change_config(quantized(model, tmp_path / "damaged"), rms_norm_eps=0.5)
    rounds = quantized(model, tmp_path / "rounds", "inputs={grid: int8}")
    before = sorted(path.name for path in tmp_path.iterdir())
    for folder, complaint in [
        (rotated, "its input turns at run time, which GGUF cannot say"),
        (damaged, "rms_norm_eps"),
        (rounds, "cannot round what this model rounds as it runs: 21 linear inputs to int8"),
        (model, "is no Paley checkpoint"),
    ]:
        shown = paley_("export", folder, "--to", "gguf", "--output", tmp_path / "gguf", code=2)
        assert complaint in shown.err
        assert shown.err.count("\n") == 1
        assert shown.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    whole = bytearray(
        file_of(export_gguf(quantized(model, tmp_path / "out"), output=tmp_path / "gguf").output).read_bytes()
    )
    kind = whole.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    damage = {
        "truncated": bytes(whole[: len(whole) // 2]),
        "unknown type": bytes(whole[:kind]) + b"\x85" + bytes(whole[kind + 1 :]),
        "blocks of 256": bytes(whole[:kind]) + bytes([gguf.GGMLQuantizationType.Q4_K]) + bytes(whole[kind + 1 :]),
    }
    for what, data in damage.items():
        file = tmp_path / f"{what}.gguf"
        file.write_bytes(data)
        shown = paley_("quantize", file, "--preset", "gguf-q4_0", "--no-score", "--output", tmp_path / "no", code=2)
        (error,) = [line for line in shown.err.splitlines() if not line.endswith("checking the checkpoint")]
        assert error.startswith(f"error: {file}: is no whole GGUF file")
        assert not list(tmp_path.glob("no*"))
