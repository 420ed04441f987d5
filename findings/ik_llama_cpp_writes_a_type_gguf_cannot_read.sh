#!/usr/bin/env bash
# ik-llama-cpp-python 0.1.5 and gguf 0.19.0, on an x86-64 Linux machine: llama-quantize writes files that the gguf package
# cannot open.
#
# K-quants need rows of a multiple of 256 values. For others, such as SmolLM2-135M's of 576, llama-quantize falls back to
# another type. In place of Q5_K, ik_llama.cpp takes a type of its own, number 133 (Q6_0: 32 values of 6 bits and a float16
# scale), and says so in one line among many. llama.cpp itself does not know the number. GGUFReader raises ValueError for
# the whole file as it reads the list of tensors, so that not even the keys can be read.
# Seen: of a one-layer model with rows of 64 values, quantized to Q5_K_S, 8 of 12 tensors have type 133;
# GGUFReader: ValueError: np.uint32(133) is not a valid GGMLQuantizationType. With rows of 256 values it opens the file.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps ik-llama-cpp-python==0.1.5
cat > "$folder/check.py" <<'PY'
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np

folder = Path(sys.argv[1])
program = Path(importlib.util.find_spec("ik_llama_cpp").origin).parent / "bin" / "llama-quantize"


def write(file: Path, width: int) -> None:
    """A LLaMA of one layer with random weights in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_merges(["t 0"])
    random = np.random.default_rng(0)
    matrices = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    for name in ["token_embd", "output"]:
        writer.add_tensor(f"{name}.weight", random.standard_normal((64, width), dtype=np.float32))
    for name in matrices:
        writer.add_tensor(f"blk.0.{name}.weight", random.standard_normal((width, width), dtype=np.float32))
    for name in ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"]:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types(file: Path) -> list[int]:
    """The numbers of the tensors' types, from the bytes after each tensor's name and shape."""
    data, found = file.read_bytes(), []
    count = struct.unpack_from("<Q", data, 8)[0]
    at = min(data.index(struct.pack("<Q", len(n)) + n) for n in (b"token_embd.weight", b"output.weight"))
    for _ in range(count):
        length = struct.unpack_from("<Q", data, at)[0]
        dims = struct.unpack_from("<I", data, at + 8 + length)[0]
        found.append(struct.unpack_from("<I", data, at + 12 + length + 8 * dims)[0])
        at += 12 + length + 8 * dims + 12
    return found


results = {}
for width in (64, 256):
    source, made = folder / f"{width}.gguf", folder / f"{width}-q5.gguf"
    write(source, width)
    subprocess.run([program, source, made, "Q5_K_S", "1"], check=True, capture_output=True)
    try:
        results[width] = f"opens, {len(gguf.GGUFReader(made).tensors)} tensors"
    except ValueError as error:
        results[width] = f"ValueError: {error}"
    found = types(made)
    print(f"rows of {width}: {found.count(133)} of {len(found)} tensors have type 133; GGUFReader: {results[width]}")
sys.exit(0 if "is not a valid GGMLQuantizationType" in results[64] and results[256].startswith("opens") else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
