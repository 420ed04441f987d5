#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): from_pretrained() of a Youtu model zeroes the embedding's row of the padding
# token, whatever the file says.
#
# What a file holds should be what is loaded, as with Llama, whose embedding has the same padding_idx. Weights that come
# from a file are marked, so that transformers' own init functions leave them alone when _init_weights() runs after
# loading. YoutuPreTrainedModel._init_weights() hands init.zeros_() a row of `weight.data`, a new tensor without the mark.
# With a tied head the logit of that token becomes zero as well. Saving the loaded model stores the zeros.
# Seen: LlamaForCausalLM keeps 0.5, YoutuForCausalLM has 0.
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
from transformers import LlamaConfig, LlamaForCausalLM, YoutuConfig, YoutuForCausalLM

sizes = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 3, "bos_token_id": 1, "eos_token_id": 2,
}
latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
kept = {}
for kind, config in (
    (LlamaForCausalLM, LlamaConfig(**sizes)), (YoutuForCausalLM, YoutuConfig(**sizes, **latent)),
):
    model = kind(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(0.5)
    folder = f"{sys.argv[1]}/{kind.__name__}"
    model.save_pretrained(folder)
    rows = kind.from_pretrained(folder).model.embed_tokens.weight
    kept[kind.__name__] = bool((rows[3] == 0.5).all())
    others = bool((rows[torch.arange(64) != 3] == 0.5).all())
    print(f"{kind.__name__}: the other rows are as stored: {others}, the padding row: {rows[3, 0]:.2g} (stored: 0.5)")
sys.exit(0 if kept == {"LlamaForCausalLM": True, "YoutuForCausalLM": False} else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
