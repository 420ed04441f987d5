#!/usr/bin/env bash
# ik-llama-cpp-python 0.1.5 computes another model than Mixtral: what experts make is added to the norm's output.
#
# Of a block, x' = x + experts(norm(x)). Here x' = norm(x) + experts(norm(x)). Four equal experts are one MLP, which numpy
# computes in both ways. Seen, as |logits - those of numpy| / |the latter|, of files of the architecture `llama`: 0 for the
# MLP; with experts .55 as it should be, and 0 with the sum as above. Qwen3-MoE is computed rightly.
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
HEADS, WIDTH, EXPERTS = 2, 128, 4
IDS = list(range(4, 36))


def write(file: Path, *, experts: bool) -> tuple[Path, dict[str, np.ndarray]]:
    """One block with random weights; attention adds nothing, so that each token stands alone."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    if experts:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([f"t{i}" for i in range(64)])
    writer.add_token_merges(["t 0"])
    random = np.random.default_rng(0)
    found = {}

    def add(name: str, value: np.ndarray) -> None:
        found[name] = value
        writer.add_tensor(f"{name}.weight", value)

    def weight(*shape: int) -> np.ndarray:
        return 0.3 * random.standard_normal(shape, dtype=np.float32)

    add("token_embd", weight(64, WIDTH))
    add("output", weight(64, WIDTH))
    for name in ["attn_q", "attn_k", "attn_v", "attn_output"]:
        add(f"blk.0.{name}", np.zeros((WIDTH, WIDTH), dtype=np.float32))
    for name in ["ffn_gate", "ffn_up", "ffn_down"]:
        one = weight(WIDTH, WIDTH) * np.float32(0.02 if name == "ffn_down" else 1)
        add(f"blk.0.{name}_exps" if experts else f"blk.0.{name}", np.stack([one] * EXPERTS) if experts else one)
    if experts:
        add("blk.0.ffn_gate_inp", weight(EXPERTS, WIDTH))
    for name in ["blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"]:
        add(name, np.ones(WIDTH, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, found


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


def norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def computed(tensors: dict[str, np.ndarray], added_to: str) -> np.ndarray:
    """The same in numpy."""
    x = tensors["token_embd"][IDS]
    read = norm(x)
    gate = read @ tensors["blk.0.ffn_gate"].T
    made = gate / (1 + np.exp(-gate)) * (read @ tensors["blk.0.ffn_up"].T) @ tensors["blk.0.ffn_down"].T
    return norm((x if added_to == "stream" else read) + made) @ tensors["output"].T


def off(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


plain, tensors = write(folder / "plain.gguf", experts=False)
stack, _ = write(folder / "stack.gguf", experts=True)
to_stream, to_norm = computed(tensors, "stream"), computed(tensors, "norm")
errors = {
    "one MLP, added to the stream": off(logits(plain), to_stream),
    "experts, added to the stream": off(logits(stack), to_stream),
    "experts, added to the norm's output": off(logits(stack), to_norm),
}
for what, error in errors.items():
    print(f"{what}: relative difference {error:.4f}", flush=True)
sys.exit(0 if [error < 0.02 for error in errors.values()] == [True, False, True] else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder" 2> "$folder/log" || { tail -5 "$folder/log"; exit 1; }
