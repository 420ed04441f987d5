import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paley import hf, kernels
from paley.core import rounding
from paley.core.errors import PaleyError
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.format.spec import QuantizationConfig
from paley.methods.nearest import quantize_nearest
from paley.model.attention import attach_schemes
from paley.model.kv_cache import PackedKVCache, cache_argument
from paley.model.linear import QuantLinear
from paley.ops.matmul import Integer, Packed, Planes

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8]])


def tiny(name: str = "llama") -> PreTrainedModel:
    sizes = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "tie_word_embeddings": name == "qwen2",
    }
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, mlp_bias=True)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=16)),
    }[name]()
    for p in model.parameters():
        p.data = p.data.bfloat16().float() + 0.25 * (p.dim() == 1)  # biases and gains that matter, exact in bfloat16
    return model.eval()


def schemes(model: PreTrainedModel) -> tuple[dict[str, LinearScheme], dict[str, AttentionScheme]]:
    """3-bit rows, 4-bit affine groups, a widening transform before down_proj, one layer with inputs only."""
    n = model.model.layers[0].self_attn.head_dim
    linears = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            linears[name] = LinearScheme(WeightScheme("int3"), ActivationScheme("int4", clip_ratio=0.9))
        if name.endswith("down_proj"):
            weight = WeightScheme("uint4", 8)
            linears[name] = LinearScheme(weight, ActivationScheme("odd3"), Transform(40, 48, 12))
    linears["model.layers.1.self_attn.o_proj"] = LinearScheme(input=ActivationScheme("gauss4"))
    kv = AttentionScheme(ActivationScheme("int3"), ActivationScheme("uint2", group_size=4), Transform(n, n, n))
    return linears, {"model.layers.0.self_attn": kv, "model.layers.1.self_attn": AttentionScheme(kv.keys)}


def quantize_(model: PreTrainedModel) -> PreTrainedModel:
    linears, attentions = schemes(model)
    for name, scheme in linears.items():
        linear = model.get_submodule(name)
        if scheme.transform is not None:
            linear.weight = nn.Parameter(scheme.transform.apply(linear.weight.data))
            linear.in_features = scheme.transform.out_dim
        q = None
        if scheme.weight is not None:
            rows = ActivationScheme(scheme.weight.grid, group_size=scheme.weight.group_size)
            q = rounding.quantize_dynamic(linear.weight.data, rows)
        model.set_submodule(name, QuantLinear.from_linear(linear, scheme, q))
    attach_schemes(model, attentions)
    return model


def section(linears: dict, attentions: dict) -> dict:
    return QuantizationConfig(linears=linears, attentions=attentions).to_dict()


def write(folder: Path, name: str = "llama") -> PreTrainedModel:
    """A checkpoint written by hand as docs/format.md says; -> the model in memory."""
    model = tiny(name)
    config = model.config.to_dict() | {
        "quantization_config": section(*schemes(model)),
        "architectures": [type(model).__name__],
    }
    quantize_(model)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight" or name != "qwen2"}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(IDS, use_cache=False).logits


@pytest.fixture(autouse=True)
def registered():
    hf.register()
    hf.register()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_what_comes_back_is_what_was_written(tmp_path, name):
    want = logits(write(tmp_path, name))
    fast = logits(hf.load(tmp_path))
    assert float((fast - want).norm()) < 0.1 * float(want.norm())  # 4-bit inputs and keys round differently
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for model, logs in ((plain, fast), (hf.load(tmp_path, product="dense"), want)):
        assert torch.equal(logits(model), logs)
        assert not model.training
        assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), QuantLinear)
    with torch.no_grad():
        cache = PackedKVCache(model)
        chunked = torch.cat([model(x, **cache_argument(model, cache)).logits for x in IDS.split(4, 1)], 1)
    torch.testing.assert_close(chunked, want, rtol=0, atol=1e-4)


def test_a_fresh_process_needs_only_the_plugin(tmp_path):
    write(tmp_path / "model")
    want = logits(hf.load(tmp_path / "model"))
    script = """
import sys, torch, paley.hf
from transformers import AutoModelForCausalLM
paley.hf.register()
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2] + "/ids.pt")
with torch.no_grad():
    torch.save(model(ids, use_cache=False).logits, sys.argv[2] + "/logits.pt")
"""
    torch.save(IDS, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "model"), str(tmp_path)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "shard_size"), [("llama", "50GB"), ("qwen2", "20KB")])
def test_saving_a_loaded_model_again(tmp_path, name, shard_size):
    want = logits(write(tmp_path / "a", name))
    hf.load(tmp_path / "a", product="dense").save_pretrained(tmp_path / "b", max_shard_size=shard_size)
    assert (len(list((tmp_path / "b").glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    assert torch.equal(logits(hf.load(tmp_path / "b", product="dense")), want)
    a, b = (json.loads((tmp_path / x / "config.json").read_text())["quantization_config"] for x in "ab")
    assert a == b


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_requested_dtype_touches_neither_codes_nor_scales(tmp_path, dtype):
    write(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, tensor in hf.load(tmp_path, dtype=dtype).state_dict().items():
        if name.endswith((".codes", ".scales", ".zeros")):
            assert tensor.dtype == stored[name].dtype == (torch.float16 if name.endswith("scales") else torch.uint8)
            assert torch.equal(tensor, stored[name])
        else:
            assert tensor.dtype == dtype
    model = hf.load(tmp_path, dtype=dtype, product="dense")
    assert logits(model).dtype == dtype
    assert model.get_submodule("model.layers.0.mlp.up_proj").product.weight.dtype == dtype


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CODES = "model.layers.1.mlp.gate_proj.codes"
SCALES = "model.layers.1.mlp.gate_proj.scales"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(CODES), rf"tensor '{CODES}' is missing"),
        (lambda t: (t.pop(NORM), t.pop("lm_head.weight")), r"tensor '.*' and 1 more tensors are missing"),
        (lambda t: t.update(extra=torch.zeros(2)), "tensor 'extra' is in the files, but not in the model"),
        (
            lambda t: t.update({CODES: t[CODES][:, 1:].clone()}),
            rf"{CODES} has shape \(40, 11\).* must have \(40, 12\)",
        ),
        (
            lambda t: t.update({CODES: t[CODES].int()}),
            rf"{CODES} is torch.int32, must be torch.uint8",
        ),
        (
            lambda t: t.update({SCALES: t[SCALES].float()}),
            rf"{SCALES} is torch.float32, must be torch.float16",
        ),
        (
            lambda t: t.update({NORM: t[NORM].int()}),
            rf"{NORM} is torch.int32, must be a float type",
        ),
        (lambda t: t.update({NORM: t[NORM][:5].clone()}), rf"{NORM} has shape \(5,\)"),
    ],
)
def test_files_that_do_not_fill_the_model_are_refused(tmp_path, change, message):
    write(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(PaleyError, match=message):
        hf.load(tmp_path)
    with pytest.raises(PaleyError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_tied_embedding_must_be_there_once(tmp_path):
    write(tmp_path, "qwen2")
    edit(tmp_path, lambda t: t.pop("model.embed_tokens.weight"))
    with pytest.raises(PaleyError, match=r"embed_tokens\.weight' and 1 more tensors are missing"):
        hf.load(tmp_path)


def reconfigure(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


GATE, DOWN, ATTENTION = (
    "model.layers.0.mlp.gate_proj",
    "model.layers.0.mlp.down_proj",
    "model.layers.0.self_attn",
)


@pytest.mark.parametrize(
    ("where", "change", "message"),
    [
        ("linears", lambda q: q.update({GATE[:-2]: q[GATE]}), f"no linear layer .* did you mean '{GATE}'"),
        ("linears", lambda q: q.update({"model.norm": q[GATE]}), "'model.norm', which is no linear layer"),
        ("linears", lambda q: q[DOWN]["transform"].update(in_dim=36), "in_dim=36, but the layer reads 40"),
        (
            "linears",
            lambda q: q[GATE]["weight"].update(group_size=5),
            f"{GATE}: .*in_features=32 .*group_size=5",
        ),
        (
            "attentions",
            lambda q: q.update({"model.norm": q[ATTENTION]}),
            "'model.norm' is no attention module",
        ),
        (None, lambda q: q.update(typo=1), "typo"),
        (None, lambda q: q.update(format_version=5), "format_version"),
    ],
)
def test_a_configuration_that_fits_nothing_is_refused(tmp_path, where, change, message):
    write(tmp_path)
    pick = lambda c: c["quantization_config"][where] if where else c["quantization_config"]  # noqa: E731
    reconfigure(tmp_path, lambda c: change(pick(c)))
    with pytest.raises(PaleyError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_quantized_head_must_not_be_tied(tmp_path):
    write(tmp_path, "qwen2")
    scheme = section({"lm_head": LinearScheme(WeightScheme("int4"))}, {})["linears"]
    reconfigure(tmp_path, lambda c: c["quantization_config"]["linears"].update(scheme))
    with pytest.raises(PaleyError, match="lm_head: its weight is tied"):
        hf.load(tmp_path)


def test_folders_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(PaleyError, match="no such folder"):
        hf.load(tmp_path / "nowhere")
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(PaleyError, match="not quantized, no Paley checkpoint"):
        hf.load(tmp_path / "plain")
    reconfigure(tmp_path / "plain", lambda c: c.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    with pytest.raises(PaleyError, match="quantized by 'gptq'"):
        hf.load(tmp_path / "plain")
    (tmp_path / "plain" / "config.json").write_text("{")
    with pytest.raises(PaleyError, match=r"config\.json"):
        hf.load(tmp_path / "plain")


def test_pickles_and_broken_files_are_refused(tmp_path):
    model = write(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(PaleyError, match=r"model\.safetensors: truncated"):
        hf.load(tmp_path)
    file.unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(PaleyError, match="the weights are pickled"):
        hf.load(tmp_path)
    with pytest.raises(PaleyError, match="the weights are pickled"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_an_attention_that_would_skip_the_cache_schemes_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(PaleyError, match="attn_implementation='eager' would not round keys"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="paley")


def test_quantizing_on_load_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = hf.PaleyConfig(**section({}, {}))
    with pytest.raises(PaleyError, match="quantize the model first"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)


def test_the_configuration_survives_its_dictionary():
    written = section(*schemes(tiny()))
    config = hf.PaleyConfig.from_dict(written)
    assert json.loads(config.to_json_string()) == written
    assert dict(config) == written
    assert config.spec.linears["model.layers.0.mlp.down_proj"].transform == Transform(40, 48, 12)


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("tensor", "value", "complaint"),
    [
        (f"{UP}.scales", torch.nan, "must be positive and finite"),
        (f"{UP}.scales", 0.0, "must be positive and finite"),
        ("model.layers.0.mlp.down_proj.zeros", 16, "holds 16, beyond the last code of uint4"),
        ("model.norm.weight", torch.inf, "holds a number that is not finite; the file is damaged"),
        ("model.embed_tokens.weight", torch.nan, "holds a number that is not finite; the file is damaged"),
    ],
)
def test_damaged_numbers_are_refused_by_name(tmp_path, tensor, value, complaint):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[tensor].flatten()[3] = value
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PaleyError, match=f"^{tmp_path}.*: {tensor}:? {complaint}"):
        hf.load(tmp_path)


def test_a_number_beyond_the_type_asked_for_is_no_damage(tmp_path):
    write(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf.load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(PaleyError, match=r"norm\.weight has no place in torch\.float16; load with another dtype"):
        hf.load(tmp_path, dtype=torch.float16)


def binary_checkpoint(folder: Path) -> None:
    """Two layers on bit planes, beside one whose inputs have no groups for them."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    inputs = {"up": ActivationScheme("uint4", group_size=32), "gate": ActivationScheme("uint4", group_size=32),
              "down": ActivationScheme("int4")}  # fmt: skip
    weight, linears = WeightScheme("free2", 32, method="nearest", scale_search="em"), {}
    for role, scheme in inputs.items():
        name = f"model.layers.0.mlp.{role}_proj"
        linears[name], linear = LinearScheme(weight, scheme), model.get_submodule(name)
        q = quantize_nearest(linear.weight.data, weight)
        model.set_submodule(name, QuantLinear.from_linear(linear, linears[name], q))
    described = config.to_dict() | {"quantization_config": section(linears, {}), "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(described))
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")


@pytest.mark.skipif(kernels.backend() != "native", reason="native kernels are not built, or off")
def test_what_kernels_multiply_stays_packed_and_is_multiplied_so(tmp_path, monkeypatch):
    products = []
    run = Planes.run
    monkeypatch.setattr(Planes, "run", lambda self, encoded, x: products.append(self) or run(self, encoded, x))
    binary_checkpoint(tmp_path)
    dense = hf.load(tmp_path, product="dense")
    assert not any(p.requires_grad for p in dense.parameters())
    want = dense(IDS).logits
    assert not products
    for how, planes, unpacked in (("auto", {"up_proj", "gate_proj"}, {"down_proj"}), ("packed", set(), set())):
        model = hf.load(tmp_path, product=how)
        layers = {n.rpartition(".")[2]: m.product for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        assert {name for name, product in layers.items() if isinstance(product, Planes)} == planes
        assert {name for name, product in layers.items() if isinstance(product, Integer)} == unpacked
        assert sum(isinstance(product, Packed) for product in layers.values()) == 3 - len(planes | unpacked)
        torch.testing.assert_close(model(IDS).logits, want, rtol=0, atol=1e-3)  # nobody turned gradients off
        assert len(products) == len(planes)
        products.clear()
