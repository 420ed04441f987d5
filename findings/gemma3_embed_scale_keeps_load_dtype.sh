#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): a Gemma 3 model loaded in bfloat16 and then cast by .float() is not the model
# that is loaded in float32, although its weights are the same numbers.
#
# Every weight of a bfloat16 file is exact in float32, so one would expect both ways to give the same logits, as they do
# for Llama. Gemma 3 multiplies its embedding by sqrt(hidden_size), which it keeps in a non-persistent buffer of the type
# it is loaded in: sqrt(640) = 25.298 becomes 25.25 in bfloat16, .float() leaves it so, and from_pretrained(dtype=float32)
# has 25.298. The attribute scalar_embed_scale keeps the exact number. What holds a model in 16 bits to compute in 32
# (as a quantizer does, a block at a time) must set the buffer again.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/check.py" <<'PY'
import sys

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

sizes = {
    "vocab_size": 64, "hidden_size": 640, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 16,
}
ids = torch.arange(32)[None]
off = {}
for kind, config in ((LlamaForCausalLM, LlamaConfig(**sizes)), (Gemma3ForCausalLM, Gemma3TextConfig(**sizes))):
    torch.manual_seed(0)
    folder = f"{sys.argv[1]}/{kind.__name__}"
    kind(config).bfloat16().save_pretrained(folder)
    cast = kind.from_pretrained(folder, dtype=torch.bfloat16).float().eval()
    loaded = kind.from_pretrained(folder, dtype=torch.float32).eval()
    same = all(torch.equal(a, b) for a, b in zip(cast.parameters(), loaded.parameters(), strict=True))
    with torch.no_grad():
        off[kind.__name__] = float((cast(ids).logits - loaded(ids).logits).abs().max())
    print(f"{kind.__name__}: equal weights: {same}, largest difference of logits: {off[kind.__name__]:.3g}")
scales = [float(model.model.embed_tokens.embed_scale) for model in (cast, loaded)]
print("embed_scale, cast and loaded:", *scales, "scalar_embed_scale:", cast.model.embed_tokens.scalar_embed_scale)
sys.exit(0 if off["LlamaForCausalLM"] == 0 and off["Gemma3ForCausalLM"] > 0 and scales[0] == 25.25 else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
