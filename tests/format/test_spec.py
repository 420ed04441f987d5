import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from paley.core import grids
from paley.core.errors import PaleyError
from paley.core.rounding import Outliers, Quantized, quantize_dynamic
from paley.core.schemes import ActivationScheme, AttentionScheme, LinearScheme, WeightScheme
from paley.core.transforms import Transform
from paley.format.checkpoint import Checkpoint
from paley.format.files import write_json
from paley.format.spec import (
    QuantizationConfig,
    decode_linear,
    encode_linear,
    expected_tensors,
    linear_bytes,
)
from paley.format.writer import ShardWriter

UP = "model.layers.0.mlp.up_proj"
CONFIG = {
    "quant_method": "paley",
    "format_version": 1,
    "linears": {UP: {"weight": {"grid": "int3", "group_size": 8}, "transform": None}},
    "attentions": {"model.layers.0.self_attn": {"keys": {"grid": "int4", "clip_ratio": 0.9}}},
}


def quantized(grid: str = "uint3", in_features: int = 24, group_size: int | None = 8) -> Quantized:
    weight = torch.randn(6, in_features, generator=torch.Generator().manual_seed(0))
    return quantize_dynamic(weight, ActivationScheme(grid, group_size=group_size))


def slot(grid: str = "uint3", group_size: int | None = 8) -> LinearScheme:
    return LinearScheme(WeightScheme(grid, group_size))


# --- the section of config.json ---------------------------------------------------------------------------


def test_a_config_survives_json():
    config = QuantizationConfig(
        linears={
            "a": LinearScheme(WeightScheme("gauss2", 16), ActivationScheme("odd4", "rms"), Transform(12, 24, 12, 5)),
            "b": LinearScheme(),
        },
        attentions={"c": AttentionScheme(values=ActivationScheme("uint2", group_size=4))},
    )
    assert QuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_defaults_are_those_of_the_schemes():
    config = QuantizationConfig.from_dict(CONFIG)
    assert config.linears[UP] == LinearScheme(WeightScheme("int3", 8))
    assert config.attentions["model.layers.0.self_attn"].keys == ActivationScheme("int4", clip_ratio=0.9)


def test_trellis_codes_of_an_older_version_are_refused():
    config = QuantizationConfig(linears={UP: LinearScheme(WeightScheme("trellis4", scale_search="rms"))}, attentions={})
    data = json.loads(json.dumps(config.to_dict()))
    assert QuantizationConfig.from_dict(data) == config
    with pytest.raises(PaleyError, match=f"{UP} has trellis codes of format version 3, .* quantize the model again"):
        QuantizationConfig.from_dict(data | {"format_version": 3})


def test_a_grid_of_ones_own_is_written_once_and_read_by_name_or_by_points():
    points = [[-1.5, 0.25], [0.5, 1.0], [1.0, -0.75]]
    own = grids.custom(torch.tensor(points))
    weight = WeightScheme(own, scale_search="rms")
    config = QuantizationConfig(linears={UP: LinearScheme(weight, ActivationScheme(own, "rms"))}, attentions={})
    data = json.loads(json.dumps(config.to_dict()))
    assert data["grids"] == {own.name: points}
    assert data["linears"][UP]["weight"]["grid"] == data["linears"][UP]["input"]["grid"] == own.name
    assert QuantizationConfig.from_dict(data) == config
    assert QuantizationConfig.from_dict(data | {"format_version": 1}) == config
    by_points = json.loads(json.dumps({key: value for key, value in data.items() if key != "grids"}))
    for place in ("weight", "input"):
        by_points["linears"][UP][place]["grid"] = {"points": points}
    assert QuantizationConfig.from_dict(by_points) == config
    del data["grids"]
    with pytest.raises(PaleyError, match=rf"weight\.grid: grid '{own.name}': its points are not known here"):
        QuantizationConfig.from_dict(data)
    assert QuantizationConfig.from_dict({"grids": {own.name: points}} | data) == config
    changed = {"grids": {own.name: [[-1.5, 0.3], *points[1:]]}} | data
    with pytest.raises(PaleyError, match=f"grids: grid '{own.name}': these points are 'custom-.*the file was changed"):
        QuantizationConfig.from_dict(changed)


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (["linear"], {}, r"linear: unknown key; did you mean 'linears'\?; known here: quant_method"),
        (
            ["linears", UP, "wieght"],
            None,
            r"linears\['model.layers.0.mlp.up_proj'\].wieght: unknown key; did you mean 'weight'\?",
        ),
        (["linears", UP, "weight", "groupsize"], 8, r"weight.groupsize: unknown key; .* 'group_size'\?"),
        (["linears", UP, "transform"], {"in_dim": 8, "outdim": 8}, r"transform.outdim: .* 'out_dim'\?"),
        (
            ["attentions", "model.layers.0.self_attn", "keys", "clip"],
            1,
            r"keys.clip: unknown key; did you mean 'clip_ratio'\?",
        ),
        (
            ["linears", UP, "weight", "grid"],
            "imt3",
            r"\['model.layers.0.mlp.up_proj'\]\.weight.grid: unknown grid 'imt3'",
        ),
        (
            ["linears", UP, "weight", "group_size"],
            "8",
            r"weight.group_size: should be a valid integer, got '8'",
        ),
        (["linears", UP, "weight", "group_size"], 0, r"group_size must be a positive integer"),
        (["linears", UP, "weight", "group_size"], True, r"weight.group_size: should be a valid integer"),
        (["linears", UP, "weight"], {}, r"weight.grid: is required and missing"),
        (["linears", UP], None, r"linears\['model.layers.0.mlp.up_proj'\]: "),
        (["linears"], [], r"linears: should be an? "),
        (["attentions", "model.layers.0.self_attn", "keys", "clip_ratio"], float("nan"), "clip_ratio"),
        (["quant_method"], "gptq", "quant_method must be 'paley', got 'gptq'"),
        (["format_version"], 5, "format_version must be 4, got 5; install the paley that wrote"),
        (["format_version"], True, "format_version must be 4, got True"),
        (["format_version"], None, "format_version must be 4, got None"),
        (["linears", UP, "weight", "grid"], {1, 2}, "is not plain JSON data"),
    ],
)
def test_a_wrong_config_is_refused_by_key(path, value, complaint):
    data = copy.deepcopy(CONFIG)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PaleyError, match=rf"^HERE: .*{complaint}"):
        QuantizationConfig.from_dict(data, "HERE")


@pytest.mark.parametrize("key", ["linears", "attentions"])
def test_a_missing_part_is_refused(key):
    data = {k: v for k, v in CONFIG.items() if k != key}
    with pytest.raises(PaleyError, match=f"{key}: is required and missing"):
        QuantizationConfig.from_dict(data)


def test_no_object_at_all():
    with pytest.raises(PaleyError, match="must be a JSON object, got list"):
        QuantizationConfig.from_dict([])


# --- one linear -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [f"{f}{b}" for f in grids.FAMILIES for b in range(2, 9)])
@pytest.mark.parametrize(("in_features", "group_size"), [(24, 8), (24, None), (13, None), (35, 7)])
def test_a_linear_comes_back_as_it_was(grid, in_features, group_size):
    q = quantized(grid, in_features, group_size)
    tensors = encode_linear("x", q)
    expected = expected_tensors("x", slot(grid, group_size), in_features, 6)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()} == expected
    back = decode_linear("x", tensors, slot(grid, group_size), in_features)
    assert back.grid == q.grid
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.scales, q.scales)
    assert (back.zeros is None) == (q.zeros is None)
    assert q.zeros is None or torch.equal(back.zeros, q.zeros)


def test_expected_tensors():
    assert expected_tensors("x", slot(), 24, 6) == {
        "x.codes": (torch.uint8, (6, 9)),
        "x.scales": (torch.float16, (6, 3)),
        "x.zeros": (torch.uint8, (6, 3)),
    }
    assert expected_tensors("x", slot("odd3", None), 13, 6) == {
        "x.codes": (torch.uint8, (6, 5)),
        "x.scales": (torch.float16, (6, 1)),
    }
    assert expected_tensors("x", LinearScheme(), 13, 6) == {"x.weight": (None, (6, 13))}
    with pytest.raises(PaleyError, match="x: in_features=25 is no multiple of group_size=8"):
        expected_tensors("x", slot(), 25, 6)
    with pytest.raises(PaleyError, match="x: in_features=24, but its transform ends at out_dim=48"):
        expected_tensors("x", LinearScheme(transform=Transform(24, 48, 12)), 24, 6)


def changed(name: str, change) -> dict[str, Tensor]:
    """The tensors of a 3-bit linear of 13 inputs, one of them changed (None: left out)."""
    tensors = encode_linear("x", quantized("uint3", 13, None))
    new = change(tensors[name].clone())
    return {k: v for k, v in (tensors | {name: new}).items() if v is not None}


def put(value, *place):
    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("x.codes", lambda t: None, "x.codes: is missing"),
        ("x.scales", lambda t: None, "x.scales: is missing"),
        ("x.zeros", lambda t: None, "x.zeros: is missing"),
        ("x.codes", lambda t: t[:, :-1], r"x.codes: must be torch.uint8 \(6, 5\), got torch.uint8 \(6, 4\)"),
        ("x.codes", lambda t: t[:5], r"x.scales: must be torch.float16 \(5, 1\)"),
        ("x.codes", lambda t: t[0], r"x.codes: must be"),
        ("x.codes", lambda t: t[0, 0], r"x.codes: must be"),
        ("x.codes", lambda t: t.to(torch.int8), "x.codes: must be torch.uint8"),
        ("x.scales", lambda t: t.float(), "x.scales: must be torch.float16"),
        ("x.scales", lambda t: t.bfloat16(), "x.scales: must be torch.float16"),
        ("x.scales", lambda t: t.expand(6, 13), "x.scales: must be"),
        ("x.zeros", lambda t: t.half(), "x.zeros: must be torch.uint8"),
        ("x.zeros", put(8, 5, 0), "x.zeros: holds 8, beyond the last code of uint3"),
        ("x.scales", put(float("nan"), 2, 0), "x.scales: must be positive and finite"),
        ("x.scales", put(float("inf"), 2, 0), "x.scales: must be positive and finite"),
        ("x.scales", put(-1.0, 2, 0), "x.scales: must be positive and finite"),
        ("x.scales", put(0.0, 2, 0), "x.scales: must be positive and finite"),
        ("x.codes", put(128, 3, 4), "x.codes: the bits after a row's last code must be 0"),
    ],
)
def test_damaged_tensors_are_refused_by_name(name, change, complaint):
    with pytest.raises(PaleyError, match=complaint):
        decode_linear("x", changed(name, change), slot("uint3", None), 13)


def test_stale_tensors_are_refused():
    tensors = encode_linear("x", quantized("int3"))
    with pytest.raises(PaleyError, match=r"x.zeros: is there, but the grid of x has no such tensor"):
        decode_linear("x", tensors | {"x.zeros": torch.zeros(6, 3, dtype=torch.uint8)}, slot("int3"), 24)
    with pytest.raises(PaleyError, match=r"x: is stored quantized, and as x.weight too"):
        decode_linear("x", tensors | {"x.weight": torch.zeros(6, 24)}, slot("int3"), 24)
    with pytest.raises(PaleyError, match="leaves the weight unquantized"):
        decode_linear("x", tensors, LinearScheme(), 24)


def test_encoding_refuses_what_would_not_come_back():
    q = quantized()
    with pytest.raises(PaleyError, match="not float16 values"):
        encode_linear("x", Quantized(q.codes, q.scales.float() * 1.0001, q.zeros, "uint3"))
    with pytest.raises(PaleyError, match="not float16 values"):
        encode_linear("x", Quantized(q.codes, q.scales * float("nan"), q.zeros, "uint3"))
    with pytest.raises(PaleyError, match=r"x.scales: must be positive"):
        encode_linear("x", Quantized(q.codes, -q.scales, q.zeros, "uint3"))
    with pytest.raises(PaleyError, match="codes must be between 0 and 3, got 0 to 7"):
        encode_linear("x", Quantized(q.codes, q.scales, q.zeros, "uint2"))
    with pytest.raises(PaleyError, match=r"x.zeros: is missing"):
        encode_linear("x", Quantized(q.codes, q.scales, None, "uint3"))
    with pytest.raises(PaleyError, match=r"x.zeros: is there"):
        encode_linear("x", Quantized(q.codes, q.scales, q.zeros, "int3"))
    with pytest.raises(PaleyError, match=r"x.zeros: must be"):
        encode_linear("x", Quantized(q.codes, q.scales, q.zeros[:1], "uint3"))
    for scales in (q.scales[0], q.scales[:, :0], q.scales[:, :1].expand(6, 5), q.scales[:3]):
        with pytest.raises(PaleyError, match=r"x: codes must be|x.scales: must be"):
            encode_linear("x", Quantized(q.codes, scales, q.zeros, "uint3"))


def with_outliers(grid: str = "free2") -> tuple[Quantized, LinearScheme]:
    points = torch.linspace(-1, 1, 4).half().expand(6, 3, 4) if grid == "free2" else torch.ones(6, 3).half()
    codes = torch.arange(6 * 24).reshape(6, 24).remainder(4).to(torch.uint8)
    outliers = Outliers(torch.tensor([2, 9], dtype=torch.int32), codes[:, :2].clone(), torch.ones(6, 1).half())
    return Quantized(codes, points, None, grid, 24, outliers), LinearScheme(
        WeightScheme("int4", 8).on_grid(grid), outliers=2
    )


@pytest.mark.parametrize("grid", ["free2", "int2"])
def test_free_points_and_outliers_come_back(grid):
    q, of = with_outliers(grid)
    tensors = encode_linear("x", q)
    found = decode_linear("x", tensors, of, 24)
    assert torch.equal(found.dequantize(), q.dequantize())
    assert linear_bytes("x", of, 24, 6, 2) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize(
    ("part", "change", "complaint"),
    [
        ("scales", lambda t: t.flip(-1), r"x.scales: points must be finite and ascend"),
        ("scales", lambda t: t * torch.nan, r"x.scales: points must be finite and ascend"),
        ("scales", lambda t: t[..., :2], r"x.scales: must be .*\(6, 3, 4\), got .*\(6, 3, 2\)"),
        ("outlier_columns", lambda t: t.flip(0), r"x.outlier_columns: must ascend within 24 columns"),
        ("outlier_columns", lambda t: t + 20, r"x.outlier_columns: must ascend within 24 columns"),
        ("outlier_columns", lambda t: t - 3, r"x.outlier_columns: must ascend within 24 columns"),
        ("outlier_columns", lambda t: t.long(), r"x.outlier_columns: must be torch.int32"),
        ("outlier_scales", lambda t: t * 0, r"x.outlier_scales: must be positive and finite"),
        ("outliers", lambda t: t[:, :1], r"x.outliers: must be .*\(6, 2\), got .*\(6, 1\)"),
        ("outliers", None, r"x.outliers: is missing"),
    ],
)
def test_damaged_points_and_outliers_are_refused_by_name(part, change, complaint):
    q, of = with_outliers()
    tensors = encode_linear("x", q)
    found = tensors.pop(f"x.{part}")
    if change is not None:
        tensors[f"x.{part}"] = change(found)
    with pytest.raises(PaleyError, match=complaint):
        decode_linear("x", tensors, of, 24)


def test_outliers_that_the_slot_does_not_name_are_refused():
    q, of = with_outliers()
    with pytest.raises(PaleyError, match=r"x.outlier_columns: is there, but"):
        decode_linear("x", encode_linear("x", q), replace(of, outliers=0), 24)
    with pytest.raises(PaleyError, match=r"outliers=24 must be fewer than its in_features=24"):
        expected_tensors("x", replace(of, outliers=24), 24, 6)


def test_float32_scales_that_float16_holds_are_stored_as_float16():
    q = quantized()
    tensors = encode_linear("x", Quantized(q.codes, q.scales.float(), q.zeros, "uint3"))
    assert torch.equal(tensors["x.scales"], q.scales)


# --- accounting -------------------------------------------------------------------------------------------


def test_every_stored_byte_is_counted(tmp_path):
    tensors = encode_linear("x", quantized("uint3", 13, None)) | {"x.bias": torch.ones(6).bfloat16()}
    size = 6 * 5 + 6 * 2 + 6 + 6 * 2
    write_json(tmp_path / "config.json", {})
    with ShardWriter(tmp_path, max_shard_bytes=20) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    assert Checkpoint.open(tmp_path).nbytes == size
    q = decode_linear("x", Checkpoint.open(tmp_path), slot("uint3", None), 13)
    assert torch.equal(q.codes, quantized("uint3", 13, None).codes)
