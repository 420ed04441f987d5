#!/usr/bin/env bash
# lm-eval 0.4.13 (with torch 2.13.0, transformers 5.24.0): a quantized KV cache changes no score, as the scores of its
# Hugging Face models never read a cache back.
#
# Who compares a model with and without a quantized cache by its log-likelihoods would expect two different numbers: that
# is what such a cache costs. HFLM reads context and continuation in one forward. A cache gives the keys and values of a
# forward back as they came (transformers' QuantizedLayer says so: the first update returns its arguments), so scores are
# equal to the bit with any cache. Read a token at a time, the same text has another likelihood through the same cache.
# What a cache costs must be measured by reading the text in pieces.
# Seen: -90.075737 by lm-eval with and without an 8-bit cache; a token at a time -90.075739 without, -89.012261 with it.
#
# Exits 0 if it is still so, 1 if it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 'lm-eval[hf]==0.4.13'
cat > "$folder/check.py" <<'PY'
import sys

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, QuantizedCache

WORDS = [f"w{i}" for i in range(60)]
tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<s>", "</s>", "<unk>", *WORDS])}, "<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class WithCache(LlamaForCausalLM):
    """Keys and values go into transformers' 8-bit cache, in every forward that is not given a cache."""

    def forward(self, input_ids, cache=None, **kwargs):
        cache = QuantizedCache("fp8", self.config) if cache is None else cache
        return super().forward(input_ids, cache=cache, use_cache=True, **kwargs)


config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2, bos_token_id=0, eos_token_id=1,
)
context, continuation = " ".join(WORDS[:40]), " " + " ".join(WORDS[40:])
scores = {}
for kind in (LlamaForCausalLM, WithCache):
    torch.manual_seed(0)
    model = kind(config).eval()
    asked = Instance("loglikelihood", {}, (context, continuation), 0)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=128)
    scores[kind.__name__] = lm.loglikelihood([asked], disable_tqdm=True)[0][0]
    print(f"{kind.__name__}: log-likelihood by lm-eval {scores[kind.__name__]:.6f}")

ids = tokenizer(context + continuation, return_tensors="pt").input_ids
for cache in (DynamicCache(config=config), QuantizedCache("fp8", config)):  # the same text, a token at a time
    total = 0.0
    with torch.no_grad():
        for at in range(ids.shape[1] - 1):
            chances = model(ids[:, at : at + 1], cache=cache).logits[0, -1].log_softmax(-1)
            total += float(chances[ids[0, at + 1]]) if at + 1 >= 40 else 0.0
    scores[type(cache).__name__] = total
    print(f"{type(cache).__name__}, read at every token: {total:.6f}")
same = scores["LlamaForCausalLM"] == scores["WithCache"]
plain, rounded = (abs(scores[name] - scores["WithCache"]) for name in ("DynamicCache", "QuantizedCache"))
sys.exit(0 if same and plain < 1e-3 < 1e-2 < rounded else 1)
PY
"$folder/venv/bin/python" "$folder/check.py"
