"""The server under load, over a tiny random pair: throughput, time to the first token, memory, the cost of a look-up.

Usage: python -m benchmarks.server [--tokens N] [--queued N] [--out results/server.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from tests.conftest import make_byte_tokenizer

from benchmarks.measure import made_by
from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.evaluation.results import write_json
from longmem.server.app import create_app
from longmem.server.engine import Memories

SAID = [{"role": "user", "content": "What is the boat called?"}]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Start a server in this process, measure it, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100, help="of each answer")
    parser.add_argument("--queued", type=int, default=200, help="clients that come at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/server.json"))
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    tokenizer = make_byte_tokenizer()
    tokenizer.eos_token = None  # every answer has as many tokens as it may
    config = AlibiGPTConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = LongMem.from_backbone(AlibiGPTForCausalLM(config), chunk_size=4, num_retrieved=16).eval()
    with tempfile.TemporaryDirectory() as folder:
        looked: list[float] = []
        _time_lookups(looked)
        store = MemoryStore.open(folder, model=model, tokenizer=tokenizer, dtype="float32")
        store.add_document("local/notes", "The boat is called Petrel. " * 400, name="boat")
        app = create_app(model, tokenizer, store, name="tiny")
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        found = _measure(url, given, looked)
        server.should_exit = True
        thread.join()
    result = made_by("server", arguments) | found
    write_json(given.out, result)
    print(json.dumps(found, indent=1))
    return result


def _measure(url: str, given: Any, looked: list[float]) -> dict[str, Any]:
    """The clients are a process of their own: they share neither the interpreter's lock nor memory with the server."""
    with multiprocessing.get_context("spawn").Pool(1) as others:

        def ask(clients: int) -> tuple[list[float], float, float]:
            """Seconds to the first token of each client, seconds in all, and processor seconds of the server."""
            used = time.process_time()
            firsts, took = others.apply(_clients, (url, clients, given.tokens))
            return firsts, took, time.process_time() - used

        ask(16)
        rounds = []
        for _ in range(given.rounds):
            looked.clear()
            few = [ask(1) for _ in range(5)]
            share = sum(looked) / sum(took for _, took, _ in few)
            one = [statistics.fmean(each[at] for each in few) / given.tokens for at in (1, 2)]
            sixteen = [each / given.tokens / 16 for each in ask(16)[1:]]
            rounds.append((1 / one[0], 1 / sixteen[0], one[0] / sixteen[0], one[1] / sixteen[1], share))
        before = _resident()
        firsts, took, _ = ask(given.queued)
        after = _resident()
    firsts.sort()
    names = (
        "tokens_per_second_one_stream",
        "tokens_per_second_16_streams",
        "throughput_16_over_1",
        "tokens_per_processor_second_16_over_1",
        "share_of_looking_up_a_memory",
    )
    return {
        "answer_tokens": given.tokens,
        **{name: statistics.median(values) for name, values in zip(names, zip(*rounds, strict=True), strict=True)},
        "queued_clients": given.queued,
        "first_token_seconds": {"median": statistics.median(firsts), "p95": firsts[int(0.95 * len(firsts))]},
        "queued_seconds_in_all": took,
        "resident_mib": {"before": before, "peak": after},
    }


def _clients(url: str, count: int, tokens: int) -> tuple[list[float], float]:
    """Seconds to the first token of each of some clients that come at once, and until all have their answers."""

    async def all_of_them() -> list[float]:
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
            return await asyncio.gather(*(_stream(client, tokens) for _ in range(count)))

    began = time.perf_counter()
    firsts = asyncio.run(all_of_them())
    return firsts, time.perf_counter() - began


async def _stream(client: httpx.AsyncClient, tokens: int) -> float:
    """Seconds to the first token of an answer that reads memory; the whole answer is read."""
    body = {"messages": SAID, "max_tokens": tokens, "temperature": 0, "stream": True, "memory_id": "notes", "recall": 5}
    began, first, last = time.perf_counter(), 0.0, ""
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            first = first or time.perf_counter() - began
            last = line if "finish_reason" in line else last
    assert '"finish_reason": "length"' in last, (
        "the answer ended by itself: rates would count tokens that were not made"
    )
    return first


def _time_lookups(looked: list[float]) -> None:
    """Note what finding and opening a named memory takes: not the search of its passages, nor its heads' reading."""

    def timed(name: str) -> None:
        whole = getattr(Memories, name)

        def measured(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return whole(*arguments)
            finally:
                looked.append(time.perf_counter() - began)

        setattr(Memories, name, measured)

    for name in ("own", "bank"):
        timed(name)


def _resident() -> float:
    """MiB that this process, the server, has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
