"""vLLM itself serves a folder through the plugin, and computes what `paley.load` computes.

It wants a vLLM that runs here: on a CPU, one that was built for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from serve_folder import IDS
from transformers import Phi3Config, Phi3ForCausalLM

import paley
from paley.recipe import apply_settings, preset
from tiny_models import save_tiny

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM, on a CPU one that was built for it"),
]

SIZES = {"hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 64}
WEIGHTS = ["test=null", "keys=null", "values=null", "hadamard=32"]
MIXED = 'overrides=[{pattern: "*.k_proj", weight: {grid: p1n64}}, {pattern: "*.0.*.up_proj", keep: true}]'


def save_phi3(folder: Path, tokenizer: Any) -> Path:
    """q, k and v are one linear in its files, too."""
    torch.manual_seed(0)
    settings = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3}
    config = Phi3Config(**SIZES, **settings, num_key_value_heads=2, initializer_range=0.2, bos_token_id=1)
    Phi3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def serve(folder: Path, **settings: object) -> tuple[int, str, str]:
    """-> exit status, output and errors. They go to files, as processes that vLLM leaves behind hold on to a pipe."""
    script = Path(__file__).with_name("serve_folder.py")
    paths = os.pathsep.join([str(Path(paley.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    output, errors = folder.with_suffix(".output"), folder.with_suffix(".errors")
    with output.open("w") as out, errors.open("w") as err:
        done = subprocess.run(
            [sys.executable, str(script), str(folder), json.dumps(settings)],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False, timeout=900,
            env=os.environ | {"PYTHONPATH": paths},
        )  # fmt: skip
    return done.returncode, output.read_text(), errors.read_text()


def served(folder: Path, **settings: object) -> torch.Tensor:
    status, output, errors = serve(folder, **settings)
    assert status == 0, errors[-3000:]
    found = json.loads(output.splitlines()[-1])
    return torch.tensor(found["logprobs"])


@torch.no_grad()
def wanted(folder: Path, product: str) -> torch.Tensor:
    logits = paley.load(folder, product=product)(torch.tensor([IDS]), use_cache=False).logits[0]
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


@pytest.mark.parametrize(
    ("kind", "name", "settings", "ours"),
    [
        ("llama", "higgs-4", [], "dense"),
        ("llama", "higgs-3", [MIXED, "embedding=null", "head=null"], "packed"),
        ("llama", "rtn-w4g32a16", ["inputs={grid: int8}", "rotate=online", "weights.method=nearest"], "integer"),
        ("llama", "higgs-4", ["rotate=folded"], "dense"),
        ("qwen tied", "higgs-4", [], "dense"),
        ("gemma tied", "higgs-4", ["embedding=null", "head=null"], "dense"),
        ("phi3", "higgs-4", [], "dense"),
    ],
)
def test_vllm_computes_what_paley_computes(kind, name, settings, ours, tmp_path, tiny_tokenizer):
    first = kind.partition(" ")[0]
    model = tmp_path / "model"
    if first == "phi3":
        save_phi3(model, tiny_tokenizer)
    else:
        sizes = SIZES | ({"head_dim": 32} if first == "gemma" else {})
        save_tiny(model, tiny_tokenizer, qwen=first == "qwen", gemma=first == "gemma", gains=True, **sizes)
    out = paley.quantize(model, apply_settings(preset(name), [*WEIGHTS, *settings]), output=tmp_path / "out").output
    theirs, mine = served(out, additional_config={"paley_product": ours}), wanted(out, ours)
    assert (theirs - mine).abs().max() < 1e-4


def test_a_traced_model_computes_the_same(tmp_path, tiny_tokenizer):
    """torch.compile sees the products as one operation each."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, **SIZES)
    out = paley.quantize(model, apply_settings(preset("higgs-4"), WEIGHTS), output=tmp_path / "out").output
    traced = {"enforce_eager": False, "compilation_config": {"mode": 3, "backend": "eager"}}
    theirs = served(out, additional_config={"paley_product": "dense"}, **traced)
    assert (theirs - wanted(out, "dense")).abs().max() < 1e-4


PARSE = """
import json, sys
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
section = json.load(open(sys.argv[1]))["quantization_config"]
config = CompressedTensorsConfig.from_config(section)
schemes = {name: scheme["weights"] for name, scheme in config.target_scheme_map.items()}
plain = {name: [args.num_bits, args.group_size, args.symmetric] for name, args in schemes.items()}
print(json.dumps({"format": config.quant_format, "ignore": config.ignore, "schemes": plain}))
"""


def test_vllm_parses_what_export_writes_for_compressed_tensors(tmp_path, tiny_tokenizer):
    """By its own CompressedTensorsConfig; that needs no plugin."""
    model = save_tiny(tmp_path / "model", tiny_tokenizer, **(SIZES | {"intermediate_size": 256}))
    settings = ["test=null", "weights.method=nearest", 'overrides=[{pattern: "*.1.mlp.*", weight: {grid: int8}}]']
    out = paley.quantize(model, apply_settings(preset("ct-w4g128"), settings), output=tmp_path / "out").output
    made = paley.export_to(out, "compressed-tensors", output=tmp_path / "ct").output
    command = [sys.executable, "-c", PARSE, str(made / "config.json")]
    with (tmp_path / "output").open("w") as output:
        subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, check=True, timeout=900)
    found = json.loads((tmp_path / "output").read_text().splitlines()[-1])
    assert (found["format"], found["ignore"]) == ("pack-quantized", ["lm_head"])
    assert set(map(tuple, found["schemes"].values())) == {(4, 128, True), (8, None, True)}
    assert found["schemes"]["model.layers.1.mlp.down_proj"] == [8, None, True]  # a scale for each row


def test_what_vllm_cannot_hold_is_one_sentence(tmp_path, tiny_tokenizer):
    model = save_tiny(tmp_path / "model", tiny_tokenizer, **SIZES)
    recipe = apply_settings(preset("higgs-4"), [*WEIGHTS, "keys={grid: int4}"])
    out = paley.quantize(model, recipe, output=tmp_path / "out").output
    status, _, errors = serve(out)
    assert status != 0
    assert "model.layers.0.self_attn quantizes keys or values, and vLLM keeps a cache of its own" in errors
