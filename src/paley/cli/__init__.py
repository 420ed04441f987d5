"""The command line `paley`: argument parsing, progress and tables. A file per verb, named after it.

Files import what is heavy in the verbs' bodies alone, so that --help and a mistyped option take no seconds.
"""

# As in --help.
from paley.cli import quantize, plan, sensitivity, eval, generate, chat, serve, inspect, report  # noqa: I001
from paley.cli import dequantize, export, verify, push, bench, doctor, presets
from paley.cli.app import app

__all__ = [
    "app", "bench", "chat", "dequantize", "doctor", "eval", "export", "generate", "inspect", "plan", "presets", "push",
    "quantize", "report", "sensitivity", "serve", "verify",
]  # fmt: skip
