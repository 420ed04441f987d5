#!/usr/bin/env bash
# transformers 5.24.0 (with torch 2.13.0): buffers can be tied by tie_weights(), but not while from_pretrained() loads.
#
# A model's all_tied_weights_keys maps each tied tensor to its source. tie_weights() resolves both with
# get_parameter_or_buffer(), so a head and an embedding that hold packed codes in buffers are tied as parameters are.
# One would expect from_pretrained(), which calls the same tie_weights(), to accept the same mapping. It does not: a later
# step, mark_tied_weights_as_initialized(), looks the names up with get_parameter() alone and raises AttributeError.
# A quantizer with a coded tied pair must therefore keep the pair out of that mapping and connect it after loading.
#
# Exits 0 if both are still so, 1 if one has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/check.py" <<'PY'
import sys

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class Coded(nn.Module):
    def __init__(self, rows, columns):
        super().__init__()
        self.register_buffer("codes", torch.zeros(rows, columns, dtype=torch.uint8))

    def forward(self, x):
        raise NotImplementedError("only its tensors matter here")


class CodedLlama(LlamaForCausalLM):
    """A tied pair whose tensors are uint8 buffers."""

    def __init__(self, config):
        super().__init__(config)
        self.model.embed_tokens = Coded(config.vocab_size, config.hidden_size)
        self.lm_head = Coded(config.vocab_size, config.hidden_size)
        self.all_tied_weights_keys = {"lm_head.codes": "model.embed_tokens.codes"}


config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, tie_word_embeddings=True,
)
model = CodedLlama(config)
model.tie_weights(recompute_mapping=False)
tied = model.lm_head.codes is model.model.embed_tokens.codes
print("tie_weights() ties the buffers:", tied)

state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.codes"}
folder = sys.argv[1] + "/saved"
config.save_pretrained(folder)
from safetensors.torch import save_file

save_file(state, folder + "/model.safetensors", metadata={"format": "pt"})
try:
    CodedLlama.from_pretrained(folder)
    raised = "nothing"
except AttributeError as error:
    raised = str(error)
print("from_pretrained() raises:", raised)
sys.exit(0 if tied and "is not an nn.Parameter" in raised else 1)
PY
"$folder/venv/bin/python" "$folder/check.py" "$folder"
