"""``longmem serve``: an OpenAI-compatible server whose answers can read memory."""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from longmem.cli.common import layout_of, load_model, load_tokenizer, say
from longmem.cli.options import FOLDER, options
from longmem.errors import ConfigError


@click.command(
    short_help="Serve a model and its memories over HTTP.",
    epilog="Example: longmem serve --model models/small/sidenet --store memory",
)
@click.option("--model", help="A checkpoint, a model by itself or a .gguf file. Default: the store's, or SmolLM2.")
@click.option("--store", "folder", type=FOLDER, default="memory", help="Where memories are kept.")
@options("tokenizer", "device")
@click.option("--host", default="127.0.0.1", help="Address to listen at.")
@click.option("--port", type=click.IntRange(0, 65535), default=8321, help="Port; 0 takes a free one.")
@click.option("--keys", "keys", type=FOLDER, help="File of API keys; without it everybody is the one owner.")
@click.option("--new-key", metavar="NAME", help="Make a key of this name in --keys, print it, and end.")
@click.option("--name", help="By which the model is listed; by default the folder's name.")
@click.option("--queue", type=click.IntRange(min=1), default=256, help="Requests that may wait.")
@click.option("--rows", type=click.IntRange(min=1), default=16, help="Answers made together.")
def command(model: str | None, folder: Path, host: str, port: int, keys: Path | None, **given: Any) -> None:
    """Answer /v1/chat/completions, /v1/completions and /v1/responses, and keep memories under /v1/memories.

    A request reads the memory that its field memory_id or its header X-Memory-Id names, and none without. The page at
    / shows memories and has a chat; /docs lists every call.
    """
    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart")
    if missing := [each for each in needed if importlib.util.find_spec(each) is None]:
        raise ConfigError(f"the server needs {', '.join(missing)}; pip install 'longmem-lm[server]'")
    from longmem.server.keys import Keys
    from longmem.server.keys import new_key as make_key

    if given["new_key"] is not None:
        if keys is None:
            raise ConfigError("--new-key writes into a file; name it with --keys")
        click.echo(make_key(keys, given["new_key"]))
        return
    allowed = Keys.read(keys)
    if not allowed.hashes and not _loopback(host):
        raise ConfigError(
            f"--host {host} can be reached by others, and there are no keys; make one with "
            "longmem serve --keys FILE --new-key NAME, and serve with --keys FILE"
        )
    try:  # before the model is loaded: that takes a while
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {host}:{port} ({error.strerror}); choose another --port or --host"
        ) from error
    import uvicorn

    from longmem.server.app import create_app
    from longmem.store.store import MemoryStore

    with listener, suppress(KeyboardInterrupt):
        loaded = load_model(model, layout_of(folder, writing=True), given["device"], default=True, closed=True)
        words = load_tokenizer(given["tokenizer"], loaded)
        store = MemoryStore.open(folder, model=loaded.model, tokenizer=words)
        listed = given["name"] or Path(model or loaded.model.config.backbone_name_or_path or "longmem").stem
        app = create_app(
            loaded.model, words, store, keys=allowed, name=listed, most_waiting=given["queue"], rows=given["rows"]
        )
        place = f"[{host}]" if ":" in host else host
        place += f":{listener.getsockname()[1]}"
        say(f"{listed} at http://{place}, memories in {folder}; Ctrl-C ends it when what was accepted is done")
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=100)).run(sockets=[listener])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
