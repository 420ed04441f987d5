"""Quantizers of others, each in an interpreter of its own: weights of the linears to 4 bits in groups.

python3 -m venv PEER; PEER/bin/pip install torch==2.13.0 auto-round==0.16.1 transformers==5.24.0, in another one
llmcompressor==0.14.0.1, in a third gptqmodel==7.0.0 transformers==5.4.0 requests (--no-build-isolation), and in a
fourth hqq==0.2.8.post1 bitsandbytes==0.50.2. The first three get the tokens that our recipes calibrate on, the others
look at weights alone; all give the weights back as floats. Groups are of 128 columns in AutoRound and of 64 in the
others: llm-compressor refuses widths like 576 that a group does not divide.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["QUANTIZERS", "run"]

_BEFORE = """
import json, resource, sys, time, torch
from importlib.metadata import version
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
path, tokens, output = sys.argv[1:]
ids = load_file(tokens)["ids"]
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
tokenizer = AutoTokenizer.from_pretrained(path)
names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"]
start = time.perf_counter()
"""
_AFTER = """
seconds = time.perf_counter() - start
weights = {f"{name}.weight": model.get_submodule(name).weight.detach().float().contiguous() for name in names}
save_file(weights, output)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": {"quantize": round(seconds, 1)}, "peak_bytes": peak, "version": version(package)}))
"""
_AUTO_ROUND = """
package = "auto-round"
from auto_round import AutoRound
data = [{"input_ids": row[None]} for row in ids]
made = AutoRound(
    model, tokenizer, scheme="W4A16", iters=200, nsamples=len(ids), seqlen=ids.shape[1], dataset=data, device_map="cpu"
)
model, _ = made.quantize()
"""
_LLM_COMPRESSOR = """
package = "llmcompressor"
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64}
recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
oneshot(
    model=model, dataset=data, recipe=recipe,
    num_calibration_samples=len(ids), max_seq_length=ids.shape[1], shuffle_calibration_samples=False,
)
"""
# Importing it needs torchvision, whose wheels on PyPI are for CUDA's torch; text models do not use it. Zeros are one
# less in memory than dequantize_weight expects, until the model is saved and loaded.
_GPTQ_MODEL = """
package = "gptqmodel"
import types
for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]
sys.modules["torchvision.transforms.functional"].InterpolationMode = None
from gptqmodel import GPTQModel, QuantizeConfig
data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids.tolist()]
made = GPTQModel.load(path, QuantizeConfig(bits=4, group_size=64, offload_to_disk=False), device="cpu")
made.quantize(data, batch_size=1, calibration_sort=None)
made.save("saved")
made = GPTQModel.load("saved", device="cpu", backend="torch")
for name in names:
    model.get_submodule(name).weight.data = made.model.get_submodule(name).dequantize_weight().T
"""
# hqq_base_quant_config(BITS): zeros are whole numbers at 4 bits, and stay as wide as scales.
_HQQ = """
package = "hqq"
from hqq.core.quantize import Quantizer
for name in names:
    weight = model.get_submodule(name).weight
    codes, meta = Quantizer.quantize(
        weight.data.float(), nbits=BITS, group_size=64, axis=1, round_zero=BITS == 4, device="cpu",
        compute_dtype=torch.float32,
    )
    weight.data = Quantizer.dequantize(codes, meta)
"""
_NF4 = """
package = "bitsandbytes"
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
for name in names:
    weight = model.get_submodule(name).weight
    weight.data = dequantize_4bit(*quantize_4bit(
        weight.data.float(), blocksize=64, compress_statistics=True, quant_type="nf4"
    ))
"""

# Name of a row -> (what runs, bits of a weight with its group's scale and zero).
QUANTIZERS = {
    "AutoRound W4 g128, 200 steps": ("auto_round", _AUTO_ROUND, 4 + 16 / 128),
    "llm-compressor GPTQ W4 g64": ("llm_compressor", _LLM_COMPRESSOR, 4 + 16 / 64),
    "GPTQModel W4 g64": ("gptq_model", _GPTQ_MODEL, 4 + (16 + 4) / 64),
    "hqq W4 g64": ("data_free", _HQQ.replace("BITS", "4"), 4 + 32 / 64),
    "hqq W3 g64": ("data_free", _HQQ.replace("BITS", "3"), 3 + 32 / 64),
    "bitsandbytes nf4 g64, scales in 8 bits": ("data_free", _NF4, 4 + (8 + 32 / 256) / 64),
}


def run(python: Path, code: str, model: Path, tokens: Tensor, folder: Path) -> tuple[dict[str, Tensor], dict]:
    """tokens int64 [sequences, seq_len] -> (weights by parameter, float32 [out, in]; seconds, peak memory, version)."""
    save_file({"ids": tokens.contiguous()}, folder / "tokens.safetensors")
    output = folder / "weights.safetensors"
    command = [python, "-c", _BEFORE + code + _AFTER, model, folder / "tokens.safetensors", output]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    made = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        raise SystemExit(f"{python}: {made.stderr[-2000:]}")
    return load_file(output), json.loads(made.stdout.splitlines()[-1])
