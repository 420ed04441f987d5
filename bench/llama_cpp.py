"""How fast are mainline llama.cpp's types, beside the engine, in one run?

LIBRARIES is a folder with libllama and its ggml libraries for each x86 level, as the npm package
@node-llama-cpp/linux-x64 has them (`npm pack`, nothing of it is run by node); the one for this processor is loaded.
MODEL's weights are written as a GGUF file in --work, and llama.cpp itself quantizes it to each of --types. Then our
folders and these files read the same prompt and decode, in turns: medians of rounds, and our ratio to each.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import statistics
import time
from pathlib import Path
from typing import Any

import gguf
import torch
from bench.record import RESULTS, provenance, save

from paley.format.checkpoint import Checkpoint
from paley.runtime import Engine

FTYPES = {
    "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q4_K_S": 14, "Q4_K_M": 15,
    "Q5_K_M": 17, "Q6_K": 18, "Q2_K_S": 21, "IQ4_NL": 25, "IQ3_S": 26, "IQ4_XS": 30, "TQ1_0": 36, "TQ2_0": 37,
}  # fmt: skip
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


class Parameters(ctypes.Structure):
    """Parameters that llama.cpp passes by value; longer than any of its structs, and only known where it is set."""

    _fields_ = [("ints", ctypes.c_int32 * 512)]


class Batch(ctypes.Structure):
    """llama_batch"""

    _fields_ = [
        ("n_tokens", ctypes.c_int32), ("token", ctypes.c_void_p), ("embd", ctypes.c_void_p), ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p), ("seq_id", ctypes.c_void_p), ("logits", ctypes.c_void_p),
    ]  # fmt: skip


class Llama:
    """llama.cpp's shared library, by ctypes."""

    def __init__(self, folder: Path):
        base, ggml, self.llama = (
            ctypes.CDLL(str(next(iter(sorted(folder.glob(f"lib{name}*.so"))))), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml.v", "llama.v")
        )
        self.kept = base, ggml
        ggml.ggml_backend_load_all_from_path(str(folder).encode())
        pointer, api = ctypes.c_void_p, self.llama
        self.quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, pointer)(lambda *_: None)
        api.llama_log_set(self.quiet, None)
        for name, result, arguments in (
            ("llama_model_default_params", Parameters, []),
            ("llama_context_default_params", Parameters, []),
            ("llama_model_quantize_default_params", Parameters, []),
            ("llama_model_quantize", ctypes.c_uint32, [ctypes.c_char_p, ctypes.c_char_p, pointer]),
            ("llama_model_load_from_file", pointer, [ctypes.c_char_p, Parameters]),
            ("llama_init_from_model", pointer, [pointer, Parameters]),
            ("llama_set_n_threads", None, [pointer, ctypes.c_int32, ctypes.c_int32]),
            ("llama_get_memory", pointer, [pointer]),
            ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
            ("llama_batch_get_one", Batch, [pointer, ctypes.c_int32]),
            ("llama_decode", ctypes.c_int32, [pointer, Batch]),
            ("llama_get_logits", pointer, [pointer]),
            ("llama_print_system_info", ctypes.c_char_p, []),
        ):
            function = getattr(api, name)
            function.restype, function.argtypes = result, arguments
        api.llama_backend_init()

    def quantize(self, source: Path, to: Path, kind: str) -> None:
        how = self.llama.llama_model_quantize_default_params()
        how.ints[0], how.ints[1] = 2, FTYPES[kind]  # threads, type
        if self.llama.llama_model_quantize(str(source).encode(), str(to).encode(), ctypes.byref(how)):
            raise SystemExit(f"llama.cpp does not quantize {source} to {kind}")


class LlamaRunner:
    """One GGUF file."""

    def __init__(self, library: Llama, file: Path, threads: int, room: int):
        self.api = library.llama
        self.model = self.api.llama_model_load_from_file(str(file).encode(), self.api.llama_model_default_params())
        if not self.model:
            raise SystemExit(f"llama.cpp does not load {file}")
        how = self.api.llama_context_default_params()
        if how.ints[0] not in (0, 512):
            raise SystemExit("this libllama has other context parameters: n_ctx is not the first one")
        how.ints[0] = room
        self.context = self.api.llama_init_from_model(self.model, how)
        self.api.llama_set_n_threads(self.context, threads, threads)

    def prefill(self, tokens: list[int]) -> None:
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self._run(tokens)

    def decode(self, token: int) -> None:
        self._run([token])

    def _run(self, tokens: list[int]) -> None:
        held = (ctypes.c_int32 * len(tokens))(*tokens)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(held, len(tokens))):
            raise SystemExit("llama.cpp failed to decode")
        self.api.llama_get_logits(self.context)  # waits for it


class EngineRunner:
    """One folder of ours."""

    def __init__(self, folder: Path, threads: int):
        self.engine = Engine.open(folder, threads)
        self.context = self.engine.start()

    def prefill(self, tokens: list[int]) -> None:
        self.context.close()
        self.context = self.engine.start()
        self.engine.read([(self.context, tokens)])

    def decode(self, token: int) -> None:
        self.engine.read([(self.context, [token])])


def write(model: Path, to: Path) -> None:
    """A LLaMA or Qwen 2 in float16, without a tokenizer. Rows of q and k keep their order: only speed is measured."""
    config = json.loads((model / "config.json").read_text())
    kind = {"llama": "llama", "qwen2": "qwen2"}[config["model_type"]]
    writer = gguf.GGUFWriter(to, kind)
    heads, width = config["num_attention_heads"], config["hidden_size"]
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config.get("head_dim") or width // heads)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(FTYPES["F16"])
    writer.add_tokenizer_model("no_vocab")
    checkpoint = Checkpoint.open(model)
    for name in checkpoint:
        tensor = checkpoint.info(name).read()
        owner, _, part = name.rpartition(".")
        block = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", owner)
        if block and block[2] not in PARTS:
            continue
        theirs = f"blk.{block[1]}.{PARTS[block[2]]}" if block else OUTER[owner]
        writer.add_tensor(f"{theirs}.{part}", (tensor.half() if tensor.dim() > 1 else tensor.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", type=Path, metavar="LIBRARIES")
    parser.add_argument("model", type=Path, metavar="MODEL", help="the checkpoint that the folders were made of")
    parser.add_argument("folders", type=Path, nargs="*", help="quantized folders")
    parser.add_argument("--types", default="Q4_0,Q4_1,Q4_K_M")
    parser.add_argument("--work", type=Path, required=True, help="a folder for GGUF files, which are kept")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-write", action="store_true", help="make the GGUF files and stop")
    parser.add_argument("--output", type=Path, default=RESULTS / "llama-cpp.json")
    args = parser.parse_args()
    library, threads = Llama(args.libraries), torch.get_num_threads()
    args.work.mkdir(parents=True, exist_ok=True)
    source = args.work / f"{args.model.name}-F16.gguf"
    if not source.exists():
        write(args.model, source)
    runners: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    room = args.prompt_tokens + args.new_tokens + 64
    for kind in args.types.split(","):
        file = args.work / f"{args.model.name}-{kind}.gguf"
        if not file.exists():
            library.quantize(source, file, kind)
        sizes[kind] = file.stat().st_size
        if not args.only_write:
            runners[kind] = LlamaRunner(library, file, threads, room)
    if args.only_write:
        return
    ours = {folder.name: EngineRunner(folder, threads) for folder in args.folders}
    runners |= ours
    tokens = [(7 * i) % 1000 + 5 for i in range(args.prompt_tokens)]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    for number in range(args.rounds + 1):  # the first one warms up
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.prefill(tokens)
            middle = time.perf_counter()
            for i in range(args.new_tokens):
                runner.decode(tokens[i % len(tokens)])
            end = time.perf_counter()
            if number:
                times[name][0].append(len(tokens) / (middle - start))
                times[name][1].append(args.new_tokens / (end - middle))
    speeds = {name: {"prefill": statistics.median(a), "decode": statistics.median(b)} for name, (a, b) in times.items()}
    ratios = {
        name: {kind: {how: speeds[name][how] / speeds[kind][how] for how in speeds[name]} for kind in sizes}
        for name in ours
    }
    result = provenance() | {
        "model": args.model.name, "llama_cpp": library.llama.llama_print_system_info().decode(),
        "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "rounds": args.rounds,
        "file_bytes": sizes, "tokens_per_second": speeds, "ratios": ratios,
    }  # fmt: skip
    save(result, args.output)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
