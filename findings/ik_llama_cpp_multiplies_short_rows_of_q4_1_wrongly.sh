#!/usr/bin/env bash
# ik-llama-cpp-python 0.1.5, on an x86-64 Linux machine with AVX-512: rows of Q4_1 and Q5_1 whose width is no multiple of
# 128 are multiplied wrongly, and `rope_freqs.weight` changes nothing.
#
# A block of these types has 32 values, so that rows of 64, 96 or 576 values are valid: SmolLM2-135M's published Q4_1 file
# has rows of 576. The file loads without a warning, and its logits are those of another model. The same values in float32
# give other logits, and Q4_0, Q5_0 and Q8_0 have no such fault.
# rope_freqs.weight is what Llama 3's RoPE divides its frequencies by. The loader calls it "tensor with strange name", checks
# its shape, and computes as if it were not there.
# Seen, as |logits of the file - logits of its float32 copy| / |the latter|: rows of 64: Q4_0 .04, Q4_1 1.40, Q5_1 1.40;
# rows of 128: .06, .05, .04. Logits with factors of 8 for all frequencies and with none differ by 0.
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
HEADS, LAYERS = 2, 2
IDS = list(range(4, 36))


def write(file: Path, width: int, kind: str, *, copied: bool, factors: float | None = None) -> Path:
    """A LLaMA with random weights rounded to `kind`; copied: their values in float32."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(width)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_merges(["t 0"])
    random, number = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.full(width // HEADS // 2, factors, dtype=np.float32))
    for name in ["token_embd", "output"]:
        writer.add_tensor(f"{name}.weight", 0.3 * random.standard_normal((64, width), dtype=np.float32))
    for layer in range(LAYERS):
        for name in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]:
            data = gguf.quantize(0.3 * random.standard_normal((width, width), dtype=np.float32), number)
            if copied:
                writer.add_tensor(f"blk.{layer}.{name}.weight", gguf.dequantize(data, number))
            else:
                writer.add_tensor(f"blk.{layer}.{name}.weight", data, raw_dtype=number)
        for name in ["attn_norm", "ffn_norm"]:
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
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
for width in (64, 128):
    for kind in ("Q4_0", "Q4_1", "Q5_1"):
        copy, coded = (logits(write(folder / "m.gguf", width, kind, copied=c)) for c in (True, False))
        errors[width, kind] = float(np.linalg.norm(coded - copy) / np.linalg.norm(copy))
        print(f"rows of {width}, {kind}: relative difference {errors[width, kind]:.3f}", flush=True)
plain, divided = (logits(write(folder / "m.gguf", 128, "Q8_0", copied=True, factors=f)) for f in (1.0, 8.0))
same = bool((plain == divided).all())
print(f"factors of 8 in rope_freqs.weight change no logit: {same}")
wrong = [errors[64, kind] > 0.5 for kind in ("Q4_1", "Q5_1")]
right = [errors[128, kind] < 0.1 for kind in ("Q4_0", "Q4_1", "Q5_1")] + [errors[64, "Q4_0"] < 0.1]
sys.exit(0 if all(wrong) and all(right) and same else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
