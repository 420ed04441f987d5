"""The vLLM plugin, experimental: vLLM serves a quantized folder through Paley's operations.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). `support.py` says which folders it
can hold; `parts.py` is what one of its layers multiplies by; `quantization.py` has the classes that vLLM asks for.
"""

from __future__ import annotations

import logging

__all__ = ["register"]


def register() -> None:
    """Makes the quantization method "paley" known to vLLM; a vLLM without the needed classes serves all else."""
    try:
        from paley.vllm_plugin.quantization import register_method
    except (ImportError, AttributeError) as error:
        logging.getLogger(__name__).warning("Paley folders are not served: this vLLM is not known (%s)", error)
        return
    register_method()
