"""What the command line calls the library's settings and functions: errors name them, and a user types options."""

from __future__ import annotations

from paley.cli.process import shell
from paley.core.errors import Call, Setting

__all__ = ["spell"]

# Setting -> option.
_OPTIONS = {
    "api_key": "--api-key",
    "against": "--against",
    "base": "--from",
    "budget.kv": "--kv-bpw",
    "budget.size": "--target-size",
    "budget.weights": "--target-bpw",
    "calibration.source": "--calibration",
    "data": "--data",
    "device": "--device",
    "expand": "--expand",
    "fold": "--fold",
    "host": "--host",
    "kind": "--type",
    "max_new_tokens": "--max-new-tokens",
    "min_p": "--min-p",
    "output": "--output",
    "plan": "--plan",
    "port": "--port",
    "preset": "--preset",
    "ray_address": "--ray-address",
    "recipe": "--recipe",
    "repetition_penalty": "--repetition-penalty",
    "seq_len": "--seq-len",
    "sequences": "--sequences",
    "source": "--text",
    "stop": "--stop",
    "system": "--system",
    "limit": "--limit",
    "task_data": "--task-data",
    "tasks": "--tasks",
    "temperature": "--temperature",
    "test.source": "--test",
    "top_k": "--top-k",
    "top_p": "--top-p",
    "weights.grid": "--grid",
    "to": "--to",
    "workers": "--workers",
}
# Of options without a value.
_FLAGS = {
    "chat=True": "--chat",
    "fold=False": "--no-fold",
    "exact=True": "--exact",
    "fold=True": "--fold",
    "kinds": "--activations",
    "overwrite": "--overwrite",
    "resume": "--resume",
    "weights_only": "--weights-only",
}
_OF_VERBS = {
    "dequantize": {"dtype": "--dtype"}, "generate": {"seed": "--seed"}, "chat": {"seed": "--seed"},
    "sensitivity": {"method": "--method"},
}  # fmt: skip
_VERBS = {"measure_sensitivity": "sensitivity", "score": "eval"}


def spell(part: Setting | Call, verb: str | None) -> str:
    """As a user of `verb` types it; a setting without an option is spelled KEY=VALUE, as --set takes it."""
    if isinstance(part, Call):
        name = _VERBS.get(part.name, part.name)
        return f"`{shell(name, *(spell(setting, name) for setting in part.settings))}`"
    whole = str(part)
    if (flag := _FLAGS.get(whole) or _FLAGS.get(part.name)) is not None:
        return flag
    option = _OF_VERBS.get(verb or "", {}).get(part.name) or _OPTIONS.get(part.name)
    return whole if option is None else option if part.value is None else f"{option} {part.value}"
