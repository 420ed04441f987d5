"""The classes that vLLM asks for: a quantization config, and the method of linears, embedding and head."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config  # pyright: ignore[reportMissingImports]
from vllm.model_executor.layers.linear import (  # pyright: ignore[reportMissingImports]
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
    register_quantization_config,
)
from vllm.model_executor.layers.quantization.base_config import (  # pyright: ignore[reportMissingImports]
    QuantizationConfig,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (  # pyright: ignore[reportMissingImports]
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper  # pyright: ignore[reportMissingImports]

from paley.arch import Architecture
from paley.core.errors import PaleyError
from paley.core.schemes import LinearScheme
from paley.format import digests
from paley.format.checkpoint import Checkpoint
from paley.format.config import QUANT_METHOD
from paley.format.config import QuantizationConfig as Spec
from paley.vllm_plugin.parts import Parts
from paley.vllm_plugin.support import check_servable

__all__ = ["PaleyConfig", "PaleyMethod", "register_method"]

PRODUCT = "paley_product"  # a key of vLLM's `additional_config`: a name of paley.ops.matmul.PRODUCTS


class PaleyConfig(QuantizationConfig):
    """The section "quantization_config" of a folder's config.json."""

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec, self.linears = spec, dict(spec.linears)
        self.row, self.tied = Architecture(block=()), False

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # PyTorch's own operations do, where kernels do not

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls(Spec.from_dict(config))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuses what vLLM cannot hold, and a local folder that is not as it was written."""
        self.row = check_servable(self.spec, hf_config.model_type)
        self.tied = bool(hf_config.tie_word_embeddings)
        if Path(model_name).is_dir():
            digests.check(Checkpoint.open(Path(model_name)))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Leaves out what no module reads."""
        carried = {re.compile(f"^{re.escape(name)}$"): None for name in self.spec.carried}
        return WeightsMapper(orig_to_new_regex=carried)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, VocabParallelEmbedding):
            head = isinstance(layer, ParallelLMHead)
            names = [self.row.head if head and not self.tied else self.row.embedding]  # some models give no prefix
            own = not (head and self.tied)
        elif isinstance(layer, LinearBase):
            names, own = self._parts(prefix), True
        else:
            return None
        schemes = [self.linears.get(name, LinearScheme()) for name in names]
        if all(scheme == LinearScheme() for scheme in schemes):
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        return PaleyMethod(names, schemes, own=own, multiplied=self.tied or (own and not _is_embedding(layer)))

    def _parts(self, prefix: str) -> list[str]:
        """The folder's names of the linears in vLLM's layer `prefix`."""
        parent, _, last = prefix.rpartition(".")
        if prefix in self.linears or last not in self.packed_modules_mapping:
            return [prefix]
        return [f"{parent}.{name}" for name in self.packed_modules_mapping[last]]


class PaleyMethod(LinearMethodBase):
    """One layer's: of a linear, an embedding, a head.

    own: False for a head that multiplies by the embedding's rows. multiplied: False for an embedding without such.
    """

    def __init__(self, names: list[str], schemes: list[LinearScheme], *, own: bool, multiplied: bool):
        self.names, self.schemes, self.own, self.multiplied = names, schemes, own, multiplied
        self.product = get_current_vllm_config().additional_config.get(PRODUCT, "auto")

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        if (input_size_per_partition, sum(output_partition_sizes)) != (input_size, output_size):
            raise PaleyError(
                f"vLLM: {self.names[0]} is not split among devices, as its input turns as a whole; leave "
                "tensor_parallel_size at 1"
            )
        if not self.own:
            return
        rows = [layer.org_vocab_size] if isinstance(layer, VocabParallelEmbedding) else output_partition_sizes
        rows = [sum(rows)] if len(self.names) == 1 else rows
        layer.paley = Parts(self.names, self.schemes, rows, input_size, params_dtype)
        for end, tensor in layer.paley.tensors.items():
            layer.register_parameter(end, tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        if self.own:
            for end in layer.paley.tensors:
                delattr(layer, end)
            layer.paley.finish_(self.product, multiplied=self.multiplied, looked_up=_is_embedding(layer))

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out]"""
        y = layer.paley(x)
        return y if bias is None else y + bias

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:  # type: ignore[override]
        """input_ int64 [...] -> [..., width]"""
        return layer.paley.look_up(input_)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        layer.paley = embed_tokens.paley
        return layer


def _is_embedding(layer: nn.Module) -> bool:
    return isinstance(layer, VocabParallelEmbedding) and not isinstance(layer, ParallelLMHead)


def register_method() -> None:
    """May be called more than once in a process."""
    register_quantization_config(QUANT_METHOD)(PaleyConfig)
