"""LoRA on a quantized model, by peft: codes stay as they are, and float matrices beside them are trained.

LoRA: Hu et al., arXiv:2106.09685; on frozen codes: Dettmers et al., arXiv:2305.14314 (QLoRA).
"""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from paley.core.errors import PaleyError
from paley.model.linear import QuantLinear

if TYPE_CHECKING:
    from peft import LoraConfig

__all__ = ["lora_config"]

_STARTS = (True, False, "gaussian")  # of init_lora_weights; the others take the float weight apart


def lora_config(model: PreTrainedModel, config: LoraConfig) -> LoraConfig:
    """A copy of peft's config with which peft takes the layers of a quantized model.

    Give it to `peft.get_peft_model`, to `PeftModel.from_pretrained` of a saved adapter (which forgets it), or to a
    trainer. target_modules="all-linear" is every coded linear but the head. Errors: peft is missing; DoRA and
    whatever else needs the float weight.
    """
    if find_spec("peft") is None:
        raise PaleyError("peft: not installed", remedy='pip install "paley[lora]"')
    from paley.pipeline.lora_layer import QuantLora

    if config.use_dora or config.init_lora_weights not in _STARTS:
        what = "use_dora" if config.use_dora else f"init_lora_weights={config.init_lora_weights!r}"
        raise PaleyError(
            f"lora_config: {what} needs float weights, and this model has codes",
            remedy="leave it out, or train what `paley dequantize` writes",
        )
    config = copy.copy(config)
    if config.target_modules == "all-linear":
        head = model.get_output_embeddings()
        linears = (name for name, part in model.named_modules() if isinstance(part, QuantLinear) and part is not head)
        config.target_modules = list(linears)
    config._custom_modules = {**(config._custom_modules or {}), QuantLinear: QuantLora}
    return config
