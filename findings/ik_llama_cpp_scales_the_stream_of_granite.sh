#!/usr/bin/env bash
# ik-llama-cpp-python 0.1.5 computes another model than Granite: its residual_scale multiplies the sum of stream and branch.
#
# Granite adds r · f(x) to the stream, with `granite.residual_scale` = r, and so does llama.cpp: both branches are scaled
# before each addition. Here x' = r · (x + f(x)). The same model with r in the weights of attn_output and ffn_down and
# residual_scale 1 should have the same logits; embedding_scale, attention.scale and logit_scale have the effects that they
# should have. Seen, as |logits of the one - logits of the other| / |the latter|: r = 1: 0; r = .4: .95.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps ik-llama-cpp-python==0.1.5
cat > "$folder/check.py" <<'PY'
import sys
from pathlib import Path

import gguf
import numpy as np

folder = Path(sys.argv[1])
HEADS, LAYERS, WIDTH = 2, 2, 128
IDS = list(range(4, 36))


def write(file: Path, scale: float, *, folded: bool) -> Path:
    """A Granite with random weights; folded: its residual_scale is in the weights that add to the stream."""
    writer = gguf.GGUFWriter(file, "granite")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_logit_scale(1.0)
    writer.add_embedding_scale(1.0)
    writer.add_attention_scale((WIDTH // HEADS) ** -0.5)
    writer.add_residual_scale(1.0 if folded else scale)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_merges(["t 0"])
    random = np.random.default_rng(0)
    for name in ["token_embd", "output"]:
        writer.add_tensor(f"{name}.weight", 0.3 * random.standard_normal((64, WIDTH), dtype=np.float32))
    for layer in range(LAYERS):
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
            weight = 0.3 * random.standard_normal((WIDTH, WIDTH), dtype=np.float32)
            adds = folded and name in ("attn_output", "ffn_down")
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight * np.float32(scale) if adds else weight)
        for name in ["attn_norm", "ffn_norm"]:
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(WIDTH, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(file: Path) -> np.ndarray:
    from ik_llama_cpp import _internals

    model = _internals.IkModel(str(file))
    context = _internals.IkContext(model, n_ctx=64, n_threads=1, flash_attn=False)
    batch = _internals.make_batch(IDS)
    for i in range(len(IDS)):
        batch.logits[i] = 1
    assert context.decode(batch) == 0
    found = np.stack([np.ctypeslib.as_array(context.get_logits(i), shape=(64,)).copy() for i in range(len(IDS))])
    context.close()
    model.close()
    return found


errors = {}
for scale in (1.0, 0.4):
    by_key, in_weights = (logits(write(folder / "m.gguf", scale, folded=f)) for f in (False, True))
    errors[scale] = float(np.linalg.norm(by_key - in_weights) / np.linalg.norm(in_weights))
    print(f"residual_scale {scale}: relative difference {errors[scale]:.3f}", flush=True)
sys.exit(0 if errors[1.0] < 1e-3 and errors[0.4] > 0.5 else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
