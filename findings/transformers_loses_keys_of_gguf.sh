#!/usr/bin/env bash
# transformers 5.24.0 (with gguf 0.19.0, torch 2.13.0): configs read from GGUF files lack what the files say, and the models
# are others than llama.cpp's.
#
# - llama: `rope_freqs.weight`, what Llama 3.1 and later divide RoPE's frequencies by, is ignored: rope_type is "default".
# - qwen3: `attention.key_length`, the size of heads, is ignored: head_dim is 128 whatever the file says.
# - gemma3: `rope.scaling.factor` of layers that see all tokens is lost, as files of 4B and more have it, and
#   query_pre_attn_scalar is 256, although attention is scaled by the root of key_length.
# Seen: default in place of llama3; 128 for 64; no factor for 8; 256 for 128.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0 numpy==2.4.6
cat > "$folder/check.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoConfig

folder = Path(sys.argv[1])


def config(architecture: str, head: int, *, factor: float | None = None, freqs: bool = False):
    writer = gguf.GGUFWriter(folder / f"{architecture}.gguf", architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_block_count(6)
    writer.add_feed_forward_length(512)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_sliding_window(512)
    writer.add_vocab_size(64)
    if factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)
    writer.add_tensor("token_embd.weight", np.zeros((64, 256), dtype=np.float32))
    if freqs:
        writer.add_tensor("rope_freqs.weight", np.linspace(1, 8, head // 2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoConfig.from_pretrained(folder, gguf_file=f"{architecture}.gguf")


llama = config("llama", 128, freqs=True).rope_parameters
qwen3 = config("qwen3", 64).head_dim
gemma3 = config("gemma3", 128, factor=8.0)
full = gemma3.rope_parameters["full_attention"]
print(f"llama with rope_freqs.weight: {llama}")
print(f"qwen3 with key_length 64: head_dim {qwen3}")
print(f"gemma3 with factor 8: {full}; with key_length 128: query_pre_attn_scalar {gemma3.query_pre_attn_scalar}")
lost = llama["rope_type"] == "default", qwen3 == 128, "factor" not in full, gemma3.query_pre_attn_scalar == 256
sys.exit(0 if all(lost) else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
