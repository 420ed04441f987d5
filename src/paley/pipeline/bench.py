"""`paley.bench`: how fast a quantized folder reads and writes here, beside rivals in the same run."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from paley.core.errors import PaleyError, Setting, nearest_name
from paley.model.decoder import ModelDecoder
from paley.model.folders import resolve
from paley.pipeline.decoder import Context, Decoder
from paley.pipeline.opening import open_decoder, why_no_engine
from paley.runtime import Engine

__all__ = ["RIVALS", "Bench", "Speed", "bench", "read_bandwidth"]

RIVALS = ("bf16", "llama.cpp", "transformers")
_WHEEL = "ik-llama-cpp-python"
_BYTES = 2**29  # of a streaming read: far more than a cache


@dataclass(frozen=True)
class Speed:
    """Tokens a second: the medians of all rounds."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Bench:
    """engine: "native", or "transformers" for `reason`. bytes_per_token: what a new token reads, cache included.

    bandwidth: bytes a second that all threads read from memory, bandwidth_of_one: that one reads alone; share: what
    decoding reads of the first. rivals: their speeds in the same rounds.
    """

    folder: str
    engine: str
    reason: str | None
    threads: int
    prompt_tokens: int
    new_tokens: int
    speed: Speed
    bytes_per_token: int | None
    bandwidth: float
    bandwidth_of_one: float
    share: float | None
    rivals: dict[str, Speed] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, with the ratios to each rival."""
        ratios = {
            name: {"prefill": self.speed.prefill / s.prefill, "decode": self.speed.decode / s.decode}
            for name, s in self.rivals.items()
        }
        rivals = {name: vars(speed) for name, speed in self.rivals.items()}
        return vars(self) | {"speed": vars(self.speed), "rivals": rivals, "ratios": ratios}


class _Runner(Protocol):
    def prefill(self, tokens: list[int]) -> None:
        """Reads a prompt in a new context."""
        ...

    def decode(self, token: int) -> None:
        """Reads one token more, up to its logits."""
        ...


class _OfDecoder:
    def __init__(self, decoder: Decoder):
        self.decoder, self.context = decoder, decoder.start()

    def prefill(self, tokens: list[int]) -> None:
        self.context.close()
        self.context: Context = self.decoder.start()
        self.decoder.read([(self.context, tokens)])

    def decode(self, token: int) -> None:
        self.decoder.read([(self.context, [token])])


class _OfLlama:
    """llama.cpp, by the wheel that has it built for this kind of machine."""

    def __init__(self, file: Path, threads: int, room: int):
        try:
            llama = importlib.import_module("ik_llama_cpp.llama")
            self.batches: Any = importlib.import_module("ik_llama_cpp._internals")
            self.api: Any = importlib.import_module("ik_llama_cpp._ctypes_api")
        except (ImportError, OSError) as error:
            raise PaleyError(
                f"llama.cpp is not installed here ({error})", remedy=f"pip install {_WHEEL}==0.1.5"
            ) from None
        self.model: Any = llama.IkLlama(str(file), n_ctx=max(room, 64), n_threads=threads, verbose=False)
        self.at = 0

    def prefill(self, tokens: list[int]) -> None:
        context = self.model._context
        context.kv_cache_clear()
        step = context._n_ubatch
        for at in range(0, len(tokens), step):
            part = tokens[at : at + step]
            self._run(self.batches.make_batch_range(part, pos_start=at, logits_last=at + step >= len(tokens)))
        self.at = len(tokens)

    def decode(self, token: int) -> None:
        self._run(self.batches.make_batch_single(token, self.at))
        self.at += 1

    def _run(self, batch: Any) -> None:
        failed = self.model._context.decode(batch)
        self.api.llama_batch_free(batch)
        if failed:
            raise PaleyError(f"llama.cpp failed with {failed}; use another file, or fewer tokens")


def bench(
    folder: str | Path,
    *,
    against: Sequence[str] = (),
    gguf: str | Path | None = None,
    prompt_tokens: int = 256,
    new_tokens: int = 64,
    rounds: int = 3,
    threads: int | None = None,
    on_round: Callable[[int], None] = lambda number: None,
) -> Bench:
    """Reads `prompt_tokens` random tokens, then `new_tokens` one by one, `rounds` times; rivals take turns with it.

    against: of RIVALS: "bf16", the same model with random weights on transformers; "transformers", this folder without
    the engine; "llama.cpp", which reads `gguf`, a file of the same model. Errors: PaleyError.
    """
    _check(against, gguf, prompt_tokens, new_tokens, rounds)
    path, before = resolve(str(folder)), torch.get_num_threads()
    threads = threads or before
    torch.set_num_threads(threads)
    try:
        reason = why_no_engine(path)
        decoder: Decoder = Engine.open(path, threads) if reason is None else open_decoder(path)
        room = prompt_tokens + new_tokens
        if decoder.limit is not None and room > decoder.limit:
            raise PaleyError(f"bench: the model reads {decoder.limit} tokens, prompt and new ones are {room}")
        runners: dict[str, _Runner] = {"": _OfDecoder(decoder)}
        for name in against:
            runners[name] = _rival(name, path, gguf, threads, room)
        speeds = _measure(runners, decoder.vocabulary, prompt_tokens, new_tokens, rounds, on_round)
        bandwidth = read_bandwidth(threads)
        of_one = read_bandwidth(1)
        read = None
        if isinstance(decoder, Engine):
            context = decoder.start()
            decoder.read([(context, [0] * (prompt_tokens + new_tokens // 2))])
            read = decoder.program.bytes_read + context.nbytes
    finally:
        torch.set_num_threads(before)
    own = speeds.pop("")
    return Bench(
        folder=str(folder), engine="native" if reason is None else "transformers", reason=reason, threads=threads,
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, speed=own, bytes_per_token=read, bandwidth=bandwidth,
        bandwidth_of_one=of_one, share=None if read is None else read * own.decode / bandwidth, rivals=speeds,
    )  # fmt: skip


def _check(against: Sequence[str], gguf: object, prompt_tokens: int, new_tokens: int, rounds: int) -> None:
    for name in against:
        if name not in RIVALS:
            raise PaleyError(Setting("against", name), f": known are {', '.join(RIVALS)}{nearest_name(name, RIVALS)}")
    if "llama.cpp" in against and gguf is None:
        raise PaleyError("llama.cpp reads GGUF files", remedy=("give ", Setting("gguf", "FILE")))
    if gguf is not None and not Path(str(gguf)).is_file():
        raise PaleyError(Setting("gguf", str(gguf)), ": no such file")
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("rounds", rounds)):
        if value < 1:
            raise PaleyError(Setting(name, value), ": must be at least 1")


def _rival(name: str, path: Path, gguf: str | Path | None, threads: int, room: int) -> _Runner:
    if name == "llama.cpp":
        return _OfLlama(Path(str(gguf)), threads, room)
    if name == "transformers":
        from paley import hf

        return _OfDecoder(ModelDecoder(hf.load(path)))
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return _OfDecoder(ModelDecoder(model))


def _measure(
    runners: dict[str, _Runner], vocabulary: int, prompt_tokens: int, new_tokens: int, rounds: int,
    on_round: Callable[[int], None],
) -> dict[str, Speed]:  # fmt: skip
    tokens = torch.randint(vocabulary // 2, (prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    times = {name: ([], []) for name in runners}
    for number in range(rounds + 1):  # the first one warms up
        on_round(number)
        for name, runner in runners.items():
            start = time.perf_counter()
            runner.prefill(tokens)
            middle = time.perf_counter()
            for i in range(new_tokens):
                runner.decode(tokens[i % prompt_tokens])
            end = time.perf_counter()
            if number:
                times[name][0].append(prompt_tokens / (middle - start))
                times[name][1].append(new_tokens / (end - middle))
    return {name: Speed(statistics.median(a), statistics.median(b)) for name, (a, b) in times.items()}


def read_bandwidth(threads: int | None = None) -> float:
    """Bytes a second that so many threads read from memory, torch's own number by default: the best of five reads."""
    data = torch.ones(_BYTES // 4)
    best, before = 0.0, torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        for _ in range(5):
            start = time.perf_counter()
            data.sum()
            best = max(best, _BYTES / (time.perf_counter() - start))
    finally:
        torch.set_num_threads(before)
    return best
