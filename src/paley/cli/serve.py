"""`paley serve`: models behind OpenAI's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paley.cli import options
from paley.cli.app import verb
from paley.cli.process import line, say
from paley.core.errors import PaleyError, Setting

if TYPE_CHECKING:
    from paley.serve import Limits

__all__ = ["serve_verb"]

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "llguidance")

Models = Annotated[
    list[str], typer.Argument(metavar="OUT ...", help="Quantized folders, or any models; NAME=OUT gives one a name.")
]
Host = Annotated[str, typer.Option("--host", help="The address to listen on; 0.0.0.0 opens it to the network.")]
Port = Annotated[int, typer.Option("--port", help="0: any free one.", min=0, max=65535)]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", help="What clients must send; better in $PALEY_API_KEY.", envvar="PALEY_API_KEY"),
]
Slots = Annotated[int, typer.Option("--slots", help="Answers of a model that are written at once.", min=1)]
Queue = Annotated[int, typer.Option("--queue", help="Answers that may wait; beyond that clients get 429.", min=0)]
MaxContext = Annotated[
    int | None, typer.Option("--max-context", help="Tokens of a prompt and its answer; the model's own.", min=2)
]


@verb("serve")
def serve_verb(
    models: Models,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    slots: Slots = 8,
    queue: Queue = 32,
    max_context: MaxContext = None,
    device: options.Device = "cpu",
) -> None:
    """Serve models to OpenAI's clients, and a page to chat on. Needs `pip install "paley[serve]"`.

    /v1/models, /v1/chat/completions and /v1/completions, /health, /metrics for Prometheus, / for people.
    Ctrl-C or SIGTERM stops it when the answers that are being written are done, or after ten seconds.

    Example: `paley serve llama-w4 --port 8000`
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise PaleyError(f"{', '.join(missing)}: not installed", remedy='pip install "paley[serve]"')
    from paley.pipeline.any_model import check_device
    from paley.pipeline.opening import open_text_model
    from paley.serve import create_app, run
    from paley.serve.run import listen

    check_device(device)
    folders = _named(models)
    if api_key is not None and not api_key.strip():
        raise PaleyError(Setting("api_key"), ": is empty", remedy="leave it out, or give one")
    if host not in _LOOPBACK and api_key is None:
        say(f"warning: anybody who reaches {host} can use this server; --api-key KEY asks for one")
    with listen(host, port) as sock:  # before the models are loaded, which takes longer
        opened = {name: open_text_model(folder, device) for name, folder in folders.items()}
        app = create_app(opened, api_key=api_key, limits=_limits(host, slots, queue, max_context))
        address = f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"

        def ready() -> None:
            line(f"serving {', '.join(folders)} at {address} (for OpenAI's clients: {address}/v1)")

        run(app, sock, ready)
    say("stopped")


def _limits(host: str, slots: int, queue: int, context: int | None) -> Limits:
    from paley.serve import Limits

    return Limits(slots=slots, queue=queue, context=context, hosts=_LOOPBACK if host in _LOOPBACK else None)


def _named(models: Sequence[str]) -> dict[str, str]:
    """Name -> folder; a folder's own name unless it is given one."""
    found: dict[str, str] = {}
    for model in models:
        name, mark, folder = model.partition("=")
        if not mark or Path(model).exists():
            name, folder = Path(model).resolve().name if Path(model).exists() else model, model
        if name in found:
            raise PaleyError(
                f"{found[name]} and {folder} would both be called {name!r}", remedy=f"name one of them: OTHER={folder}"
            )
        if not name or not folder:
            raise PaleyError(f"{model!r}: wants NAME=OUT")
        found[name] = folder
    return found
