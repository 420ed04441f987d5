"""`Engine`: a decoder (see `paley.pipeline.decoder`) whose every call is one call of native code."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from paley.core.errors import PaleyError
from paley.format import digests
from paley.kernels import native as kernels
from paley.runtime import native
from paley.runtime.program import Program, build
from paley.runtime.support import Facts, facts_of
from paley.runtime.weights import Mapped, check_tensors

__all__ = ["Engine", "EngineContext"]

_PIECE = 512  # tokens that a native call reads at most: Ctrl-C waits no longer
_STEP = 1024  # tables of angles grow by so many positions


class EngineContext:
    """One text: its keys and values, packed. Made by `Engine.start`."""

    def __init__(self, engine: Engine):
        self._engine, self._length = engine, 0
        handle = ctypes.c_void_p()
        kernels.call(native.library().paley_context_new, engine.handle, ctypes.byref(handle))
        self._handle: int | None = handle.value
        # The engine outlives its contexts.
        self._close = weakref.finalize(self, _free_context, self._handle, engine)

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return self._length

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values of the tokens held."""
        found = ctypes.c_int64()
        kernels.call(native.library().paley_context_bytes, self.handle, ctypes.byref(found))
        return found.value

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise PaleyError("context: it was closed; start a new one")
        _ = self._engine.handle  # raises if the engine was closed: a context reads its facts there
        return self._handle

    def belongs_to(self, engine: Engine) -> bool:
        return self._engine is engine

    def truncate(self, length: int) -> None:
        """Forgets all tokens from place `length` on; PaleyError where a layer's window has moved beyond it."""
        if not 0 <= length <= self._length:
            raise PaleyError(f"context: holds {self._length} tokens", got=length)
        if native.library().paley_context_truncate(self.handle, length):
            raise PaleyError(f"context: a layer's window has moved on and cannot go back to {length}; start a new one")
        self._length = length

    def close(self) -> None:
        """Frees the keys and values; a second time does nothing."""
        self._handle = None
        self._close()

    def moved_to(self, length: int) -> None:
        """Notes what a read has done."""
        self._length = length


class Engine:
    """A quantized folder, ready to read tokens. Open it with `Engine.open`."""

    def __init__(self, facts: Facts, threads: int):
        self.facts, self.threads = facts, threads
        self._tensors = Mapped(facts.checkpoint)
        self.program: Program
        self.program, model = build(facts, self._tensors, threads)
        self._tables: list[Tensor] = []
        self._positions = 0
        handle = ctypes.c_void_p()
        level = kernels.LEVELS.index(kernels.best_planes_level())
        kernels.call(
            native.library().paley_engine_new, ctypes.byref(model), threads, level, ctypes.byref(handle)
        )  # fmt: skip
        self._handle: int | None = handle.value
        self._process = os.getpid()
        self._close = weakref.finalize(self, _free_engine, self._handle, (self.program, self._tensors))

    @classmethod
    def open(cls, path: str | Path, threads: int | None = None) -> Self:
        """The engine for the quantized folder `path`; threads: as many as PyTorch has, unless given.

        Errors: PaleyError for a folder that the engine does not run (`why_not` tells), or that is damaged.
        """
        folder = Path(path)
        if threads is not None and not 1 <= threads <= 256:
            raise PaleyError("engine: threads must be 1 to 256", got=threads)
        facts, reason = facts_of(folder)
        if facts is None:
            raise PaleyError(f"{folder}: the engine does not run this model: {reason}; paley.load does")
        digests.check(facts.checkpoint)
        check_tensors(facts)
        return cls(facts, threads or torch.get_num_threads())

    @property
    def handle(self) -> int:
        if self._handle is None:
            raise PaleyError("engine: it was closed; open the folder again")
        if os.getpid() != self._process:
            raise PaleyError("engine: its threads are not in this forked process; open the folder again here")
        return self._handle

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return int(self.facts.config.vocab_size)

    @property
    def limit(self) -> int | None:
        """The most tokens that a context holds."""
        return self.facts.limit

    def start(self) -> EngineContext:
        """An empty context."""
        return EngineContext(self)

    def close(self) -> None:
        """Frees the engine; its contexts must not be read any more. A second time does nothing."""
        self._handle = None
        self._close()

    def read(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> Tensor:
        """See `pipeline.decoder.Decoder.read`; the contexts are those of `start`."""
        self._check(parts)
        before = [(context, context.length) for context, _ in parts]
        logits = torch.empty(len(parts), self.vocabulary)
        try:
            for piece in self._pieces(parts):
                self._read_piece(piece, logits)
            for context, tokens in parts:
                context.moved_to(context.length + len(tokens))
        except BaseException:
            for context, length in before:
                _go_back(context, length)
            raise
        return logits

    def _pieces(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> list[list[tuple[int, Any, list[int], int, bool]]]:
        """Calls of at most _PIECE tokens: (part, context, tokens, context's length then, whether it is the end)."""
        calls, room = [list[Any]()], _PIECE
        for number, (context, tokens) in enumerate(parts):
            at = 0
            while at < len(tokens):
                count = min(room, len(tokens) - at)
                last = at + count == len(tokens)
                calls[-1].append((number, context, list(tokens[at : at + count]), context.length + at, last))
                at, room = at + count, room - count
                if room == 0:
                    calls.append([])
                    room = _PIECE
        return [call for call in calls if call]

    def _read_piece(self, piece: list[tuple[int, Any, list[int], int, bool]], logits: Tensor) -> None:
        self._grow(max(length + len(tokens) for _, _, tokens, length, _ in piece))
        ids = [native.array(ctypes.c_int32, tokens) for _, _, tokens, _, _ in piece]
        structs = [
            native.PartStruct(context.handle, ctypes.addressof(held), len(tokens), length, context.length, int(wanted))
            for held, (_, context, tokens, length, wanted) in zip(ids, piece, strict=True)
        ]
        ends = [number for number, _, _, _, wanted in piece if wanted]
        # PyTorch's copies wake its own threads, which then keep a core from the engine's: usually there is none.
        whole = ends == list(range(len(logits)))
        found = logits if whole else torch.empty(len(ends), self.vocabulary)
        tables = native.array(ctypes.c_void_p, [table.data_ptr() for table in self._tables])
        kernels.call(
            native.library().paley_read, self.handle, native.array(native.PartStruct, structs), len(structs), tables,
            self._positions, found.data_ptr(),
        )  # fmt: skip
        if ends and not whole:
            logits[ends] = found

    def _grow(self, tokens: int) -> None:
        """Makes tables of angles for so many positions."""
        if tokens <= self._positions:
            return
        positions = -(-tokens // _STEP) * _STEP
        self._tables = [rope.table(positions) for rope in self.program.ropes]
        self._positions = positions

    def _check(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> None:
        if not parts or len({id(context) for context, _ in parts}) < len(parts):
            raise PaleyError("decoder: wants at least one part, and no context twice")
        for context, tokens in parts:
            if not isinstance(context, EngineContext) or not context.belongs_to(self):
                raise PaleyError("decoder: a context belongs to the engine that started it")
            if not tokens or not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise PaleyError(f"decoder: wants one or more tokens from 0 to {self.vocabulary - 1}")
            if context.handle and context.length + len(tokens) > self.facts.limit:
                raise PaleyError(
                    f"decoder: a context of {context.length} tokens and {len(tokens)} more are beyond the "
                    f"{self.facts.limit} that this model reads (max_position_embeddings)"
                )


def _go_back(context: EngineContext, length: int) -> None:
    """After a read that failed, or was interrupted between its end and the note of it."""
    native.library().paley_context_truncate(context.handle, length)
    context.moved_to(length)


def _free_engine(handle: int | None, kept: object) -> None:
    native.library().paley_engine_free(handle)


def _free_context(handle: int | None, engine: Engine) -> None:
    native.library().paley_context_free(handle)
