#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): Gemma3TextConfig takes attn_logit_softcapping, and the model does not apply it.
#
# The config documents it as "Scaling factor when applying tanh softcapping on the attention scores", and Gemma 2, which
# has the same field, applies it: a cap of 0.01 changes every logit of a random model. One would expect the same of
# Gemma 3, whose eager attention has a `softcap` argument too. Its attention keeps the number as an attribute and never
# hands it on, so that logits are equal to the bit with and without a cap. Google's checkpoints of Gemma 3 have no cap, so
# nobody meets it there; a checkpoint that sets one is computed without it, and nothing says so.
# Seen: Gemma2ForCausalLM 6.68, Gemma3ForCausalLM 0 (the largest change of a logit).
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
from transformers import Gemma2Config, Gemma2ForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.5,
}
ids = torch.arange(48)[None]
off = {}
for kind, config in ((Gemma2ForCausalLM, Gemma2Config), (Gemma3ForCausalLM, Gemma3TextConfig)):
    logits = []
    for cap in (None, 0.01):
        torch.manual_seed(0)
        model = kind._from_config(config(**sizes, attn_logit_softcapping=cap), attn_implementation="eager").eval()
        assert model.config.attn_logit_softcapping == cap
        with torch.no_grad():
            logits.append(model(ids).logits)
    off[kind.__name__] = float((logits[0] - logits[1]).abs().max())
    print(f"{kind.__name__}: a cap of 0.01 changes logits by up to {off[kind.__name__]:.3g}")
sys.exit(0 if off["Gemma2ForCausalLM"] > 0 and off["Gemma3ForCausalLM"] == 0 else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
