"""vLLM itself on a folder, in a process of its own: prints the log-probability of each token of a prompt as JSON.

python serve_folder.py FOLDER SETTINGS, with settings of vllm.LLM as JSON.
"""

from __future__ import annotations

import json
import os
import sys

IDS = [1, *range(5, 250, 7)]
SETTINGS = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 64,
    "enable_prefix_caching": False, "skip_tokenizer_init": True,
}  # fmt: skip
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": "",
}  # fmt: skip


def main(folder: str, settings: str) -> None:
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    import paley.vllm_plugin

    paley.vllm_plugin.register()
    paley.vllm_plugin.register()  # as vLLM may do it
    llm = LLM(folder, **SETTINGS | json.loads(settings))
    sampling = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": IDS}], sampling, use_tqdm=False)
    found = [places[token].logprob for token, places in zip(IDS[1:], output.prompt_logprobs[1:], strict=True)]
    print("\n" + json.dumps({"logprobs": found, "tokens": list(output.outputs[0].token_ids)}), flush=True)
    os._exit(0)  # vLLM's threads may wait for each other at the end


if __name__ == "__main__":
    main(*sys.argv[1:])
