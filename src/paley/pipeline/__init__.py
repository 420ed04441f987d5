"""The stages of a run: decide a plan, execute it, save, verify, evaluate; killed at any point, it resumes."""

from paley.pipeline.monitor import Monitor
from paley.pipeline.run import Outcome, make_plan, quantize

__all__ = ["Monitor", "Outcome", "make_plan", "quantize"]
