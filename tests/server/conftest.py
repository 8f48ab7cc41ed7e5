"""A live server over a tiny random model, in a thread of this process."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import make_pair
from transformers import PreTrainedTokenizerFast

pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from longmem import LongMem, MemoryStore  # noqa: E402
from longmem.server.app import create_app  # noqa: E402
from longmem.server.requests import new_key, read_keys  # noqa: E402

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="session")
def pair(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("pair"), byte_tokenizer)


@pytest.fixture(scope="session")
def tiny(pair: Path) -> LongMem:
    return LongMem.from_pretrained(pair).eval()


class Live:
    """A running server over a store that the model ``tiny`` and others read, with a key for ann and one for bob."""

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.url, self.keys = url, keys
        self.clients = {
            owner: httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)
            for owner, key in keys.items()
        }

    def client(self, owner: str = "ann") -> Any:
        """The real client of OpenAI."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[owner], max_retries=0, timeout=60)

    def http(self, owner: str = "ann") -> httpx.Client:
        """A plain client with the owner's key."""
        return self.clients[owner]

    def chat(self, **settings: Any) -> Any:
        """An answer to Hello, unless the messages are others."""
        return self.client().chat.completions.create(**{"model": "tiny", "messages": HELLO, **settings})

    def memory(self, name: str, owner: str = "ann", **documents: str) -> str:
        """Make a memory with documents; returns its name."""
        assert self.http(owner).post("/v1/memories", json={"id": name}).status_code == 201
        for document, text in documents.items():
            body = {"name": document, "text": text}
            assert self.http(owner).post(f"/v1/memories/{name}/documents", json=body).status_code == 201
        return name


Start = Callable[..., Any]


@pytest.fixture(scope="session")
def start(tiny: LongMem, byte_tokenizer: PreTrainedTokenizerFast) -> Start:
    """``with start(folder) as live:`` a server over a store in a folder; leaving the block stops it gracefully."""

    @contextmanager
    def running(folder: Path, *, anybody: bool = False, model: Any = tiny, **settings: Any) -> Iterator[Live]:
        store = MemoryStore.open(folder / "store", model=model, tokenizer=byte_tokenizer, dtype="float32")
        keys = {name: new_key(folder / "keys", name) for name in ("ann", "bob")}
        allowed = None if anybody else read_keys(folder / "keys")
        app = create_app(model, byte_tokenizer, store, keys=allowed, name="tiny", **settings)
        listener = socket.create_server(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        live = Live(f"http://127.0.0.1:{listener.getsockname()[1]}", keys)
        try:
            yield live
        finally:
            for client in live.clients.values():
                client.close()
            server.should_exit = True
            thread.join(timeout=30)
            listener.close()

    return running


@pytest.fixture(scope="module")
def live(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with start(tmp_path_factory.mktemp("server")) as running:
        yield running
