"""A server that speaks OpenAI's protocol: `create_app` makes the application, `run` serves it.

It needs the packages of `pip install "paley[serve]"`.
"""

from paley.serve.app import Limits, create_app
from paley.serve.run import run

__all__ = ["Limits", "create_app", "run"]
