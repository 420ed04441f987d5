"""The transformers plugin: after `register()`, AutoModelForCausalLM loads quantized checkpoints of ours.

Without it transformers only warns about the unknown method and returns a model with random weights.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from paley.core.errors import PaleyError, nearest_name
from paley.format import digests
from paley.format.checkpoint import Checkpoint
from paley.format.digests import DIGESTS
from paley.format.header import TensorInfo, read_header
from paley.format.spec import DIAGONAL, PARTS, QUANT_METHOD, QuantizationConfig, check_values, expected_tensors
from paley.model import attention
from paley.model.adapter import Adapter
from paley.model.checks import check_config, check_layers
from paley.model.coded import Coded
from paley.model.loading import default_attention, plain_attention, tied_partners
from paley.model.reading import build_, prepare_, tie_
from paley.ops.matmul import CALIBRATION

__all__ = ["PaleyConfig", "PaleyQuantizer", "check_digests", "check_files", "check_stored", "load", "register"]


_LOG = logging.getLogger(__name__)

# The products that `from_pretrained` makes ready; None while `load` is at work, which does so on the right device.
_PRODUCT: ContextVar[str | None] = ContextVar("product", default="auto")


class PaleyConfig(QuantizationConfigMixin):
    """What config.json says under "quantization_config"; `spec` holds it checked."""

    quant_method = QUANT_METHOD  # type: ignore[assignment]

    def __init__(self, **fields: Any):
        self.spec = QuantizationConfig.from_dict(fields)

    def to_dict(self) -> dict[str, Any]:
        """For a model that is saved again: its files are others, which no digest is known of."""
        return self.spec.model_copy(update={"digest": None}).to_dict()

    def __iter__(self) -> Generator[tuple[str, Any], None, None]:
        yield from self.to_dict().items()


class PaleyQuantizer(HfQuantizer):
    """Puts packed layers and KV slots into the empty model, and refuses files that do not fill it exactly."""

    quantization_config: PaleyConfig

    def __init__(self, quantization_config: PaleyConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        if not self.pre_quantized:
            raise PaleyError(
                "PaleyConfig loads quantized checkpoints only; quantize the model first (`paley quantize`)"
            )

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        if config._name_or_path and (folder := Path(config._name_or_path)).is_dir():
            _check_config(folder)
        asked = config._attn_implementation
        attentions = self.quantization_config.spec.attentions.values()
        if asked == default_attention(config):
            config._attn_implementation = plain_attention(config)
        elif any(map(attention.rounds, attentions)):
            attention.check_implementation(asked)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        spec = self.quantization_config.spec
        inputs = any(scheme.input for scheme in spec.linears.values())
        if dtype != torch.float32 and (inputs or any(map(attention.rounds, spec.attentions.values()))):
            _LOG.warning(
                "the scores of this model were measured in float32; in %s its inputs, keys and values are rounded at "
                "other places, and predictions differ (dtype=torch.float32 is what paley.load takes)",
                dtype,
            )
        return dtype

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        spec = self.quantization_config.spec
        if model.get_output_embeddings() is None:
            raise PaleyError(
                f"{type(model).__name__} has no head: load a Paley model with paley.load or AutoModelForCausalLM, and "
                "take its base_model"
            )
        if not checkpoint_files:
            raise PaleyError("a Paley model is loaded from its safetensors files; a state_dict alone is not supported")
        build_(model, spec)
        _stand_in_(model)
        self._stored = check_files(model, checkpoint_files, spec.carried)
        folder = Path(checkpoint_files[0]).parent
        _fetch_digests(model.config)
        check_digests(folder)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, Coded):
                vars(module).pop("weight", None)
        tie_(Adapter(model))
        check_stored(model, self._stored)
        if (product := _PRODUCT.get()) is not None:
            prepare_(model, product, model.dtype)
        model.requires_grad_(False)  # inputs that want gradients keep layers off the kernels
        return model

    def is_serializable(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        """Of adapters beside the codes, as transformers means it (see `paley.lora_config`)."""
        return True


def register() -> None:
    """Makes quant_method and attn_implementation "paley" known to transformers, once."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(PaleyConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(PaleyQuantizer)
    attention.register()


def load(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    product: str = "auto",
) -> PreTrainedModel:
    """The model in the quantized checkpoint folder `path`; codes and scales keep their types.

    product: how weights are multiplied, a name of `paley.ops.matmul.PRODUCTS`. "auto" takes for each layer the fastest
    that there is here, "dense" writes every weight out (scores are measured so),
    "packed" decodes a weight whenever it is used, slowly and in the least memory.
    Errors: not a Paley folder; tensors that are missing, too many, of the wrong shape or type, or damaged.
    """
    register()
    if product == CALIBRATION:
        raise PaleyError(f"product {product!r} is for calibration alone; use product='auto'")
    folder = Path(path)
    section = _check_config(folder).config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method != QUANT_METHOD:
        what = f"quantized by {method!r}" if method else "not quantized"
        raise PaleyError(f"{folder}: this model is {what}, no Paley checkpoint; use transformers itself")
    token = _PRODUCT.set(None)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (PaleyError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # config.json and generation_config.json are anybody's
        raise PaleyError(
            f"{folder}: transformers cannot load this model: {' '.join(str(error).split())[:300]}"
        ) from error
    finally:
        _PRODUCT.reset(token)
    model.to(device)  # type: ignore[arg-type]
    prepare_(model, product, dtype)
    return model


def _stand_in_(model: PreTrainedModel) -> None:
    """Gives coded layers a `weight` without values while transformers initializes and ties what it expects there."""
    for module in model.modules():
        if isinstance(module, Coded) and module.weight is None:
            weight: Any = torch.empty(module.rows, module.width, device="meta")
            weight._is_hf_initialized = True
            vars(module)["weight"] = weight


def _check_config(folder: Path) -> Checkpoint:
    """-> the folder's files; raises for a config.json that was changed, before anything is made of its numbers."""
    checkpoint, file = Checkpoint.open(folder), folder / "config.json"
    check_config(file, checkpoint.config)
    check_layers(file, checkpoint.config, checkpoint.names)
    if (folder / DIGESTS).exists():
        digests.Digests.load(folder).check_config(folder, checkpoint.config)
    return checkpoint


def _fetch_digests(config: PreTrainedConfig) -> None:
    """Downloads them for a name of the Hub's: transformers downloads what it knows itself."""
    name = config._name_or_path
    if not Path(name).is_dir():
        cached_file(
            name, DIGESTS, revision=config._commit_hash, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )  # fmt: skip


def check_digests(folder: Path) -> None:
    """Raises unless config and tensors are as they were written; a folder without digests is loaded with a warning."""
    if not digests.check(Checkpoint.open(folder)):
        _LOG.warning(
            "%s has no digests: an older Paley wrote it, or a loaded model was saved again; damage to its numbers or "
            "its config would not be noticed",
            folder,
        )


def check_files(model: PreTrainedModel, files: Iterable[str], carried: Iterable[str] = ()) -> dict[str, TensorInfo]:
    """Compares the names, shapes and types in the files' headers with what the model needs -> the headers' entries.

    transformers itself fills what is missing with random numbers and mentions it in a log.
    """
    needed, found, folder = model.state_dict(), dict[str, TensorInfo](), Path()
    for file in map(Path, files):
        if file.suffix != ".safetensors":
            raise PaleyError(f"{file}: Paley checkpoints are safetensors files; other weights are not opened")
        folder = file.parent
        found |= read_header(file)
    partners = tied_partners(model)
    missing = [n for n in needed if n not in found and partners.get(n) not in found]
    if missing:
        raise PaleyError(f"{folder}: {_count(missing)} missing from the files; copy the whole folder again")
    carried = set(carried)
    unexpected = [n for n in found if n not in needed and n not in carried]
    if unexpected:
        hint = nearest_name(unexpected[0], needed)
        raise PaleyError(f"{folder}: {_count(unexpected)} in the files, but not in the model{hint}")
    exact = _exact_dtypes(model)
    for name in needed.keys() & found.keys():
        info = found[name]
        shape, dtype = tuple(needed[name].shape), exact.get(name)
        if info.shape != shape:
            raise PaleyError(f"{info.file}: {name} has shape {info.shape}, must have {shape}")
        if info.dtype != dtype if dtype else info.dtype.is_floating_point != needed[name].is_floating_point():
            raise PaleyError(f"{info.file}: {name} is {info.dtype}, must be {dtype or 'a float type'}")
    return found


def check_stored(model: PreTrainedModel, stored: Mapping[str, TensorInfo]) -> None:
    """Raises for a damaged number, which could go unnoticed in fluent text.

    stored: entries of the files' headers. What is not in memory is read from its file, one layer at a time.
    """
    state = model.state_dict()

    def value(name: str) -> torch.Tensor:
        return stored[name].read() if state[name].is_meta and name in stored else state[name]

    for name, module in model.named_modules():
        if isinstance(module, Coded) and module.scheme.weight is not None:
            if name + PARTS[0] not in stored:  # a tied head, checked as the embedding
                continue
            found = {name + part: value(name + part) for part in PARTS if name + part in state}
            try:
                check_values(name, found, module.width, module.scheme.weight.grid)
            except PaleyError as error:
                raise PaleyError(f"{stored[name + PARTS[0]].file.parent}: {error}") from None
        if isinstance(module, Coded) and module.diagonal is not None and not bool((value(name + DIAGONAL) > 0).all()):
            raise PaleyError(f"{stored[name + DIAGONAL].file}: {name + DIAGONAL} must be positive; the file is damaged")
    for name, info in stored.items():
        if name in state and state[name].is_floating_point() and not bool(value(name).isfinite().all()):
            if bool(info.read().isfinite().all()):
                raise PaleyError(f"{info.file}: {name} has no place in {state[name].dtype}; load with another dtype")
            raise PaleyError(f"{info.file}: {name} holds a number that is not finite; the file is damaged")


def _exact_dtypes(model: PreTrainedModel) -> dict[str, torch.dtype | None]:
    """Of each packed layer's tensors, which no cast may touch; None where any float type will do."""
    return {
        full: dtype
        for name, module in model.named_modules()
        if isinstance(module, Coded)
        for full, (dtype, _) in expected_tensors(name, module.scheme, module.width, module.rows).items()
    }


def _count(names: list[str]) -> str:
    more = f" and {len(names) - 1} more tensors are" if len(names) > 1 else " is"
    return f"tensor {names[0]!r}{more}"
