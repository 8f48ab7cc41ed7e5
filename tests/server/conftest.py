"""A live server over a tiny random model, in a thread of this process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore  # noqa: E402
from longmem.server.access import new_key, read_keys  # noqa: E402
from longmem.server.app import create_app  # noqa: E402


@pytest.fixture(scope="session")
def tiny(byte_tokenizer: PreTrainedTokenizerFast) -> LongMem:
    torch.manual_seed(0)
    config = AlibiGPTConfig(
        vocab_size=len(byte_tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return LongMem.from_backbone(AlibiGPTForCausalLM(config), chunk_size=4, num_retrieved=16).eval()


class Live:
    """A running server.

    Attributes:
        url: of it.
        keys: API keys by the names of their owners.
    """

    def __init__(self, url: str, keys: dict[str, str]) -> None:
        self.url, self.keys = url, keys

    def client(self, owner: str = "ann") -> Any:
        """The real client of OpenAI."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys.get(owner, "none"), max_retries=0, timeout=60)


Start = Callable[..., Any]


@pytest.fixture(scope="session")
def start(tiny: LongMem, byte_tokenizer: PreTrainedTokenizerFast) -> Start:
    """``with start(folder) as live:`` a server over the store in a folder; leaving the block stops it gracefully."""

    @contextmanager
    def running(folder: Path, *, anybody: bool = False, model: Any = tiny, **settings: Any) -> Iterator[Live]:
        store = MemoryStore.open(folder / "store", model=model, tokenizer=byte_tokenizer, dtype="float32")
        file = folder / "keys"
        keys = {name: new_key(folder / f"{name}.key", name) for name in ("ann", "bob") if not file.exists()}
        if keys:
            file.write_text("".join((folder / f"{name}.key").read_text() for name in keys))
            (folder / "plain").write_text("\n".join(f"{name} {key}" for name, key in keys.items()))
        known = dict(line.split(" ") for line in (folder / "plain").read_text().splitlines())
        allowed = None if anybody else read_keys(file)
        app = create_app(model, byte_tokenizer, store, keys=allowed, name="tiny", **settings)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield Live(f"http://127.0.0.1:{listener.getsockname()[1]}", known)
        finally:
            server.should_exit = True
            thread.join(timeout=30)
            listener.close()

    return running


@pytest.fixture(scope="module")
def live(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    with start(tmp_path_factory.mktemp("server")) as running:
        yield running
