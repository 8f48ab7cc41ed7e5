"""The server under load, over a tiny random pair: throughput, time to the first token, memory, the cost of a look-up.

Usage: python -m benchmarks.server [--tokens N] [--queued N] [--out results/server.json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from tests.conftest import make_byte_tokenizer

from benchmarks.measure import surroundings
from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryStore
from longmem.evaluation.results import write_json
from longmem.server.app import create_app
from longmem.server.memories import Memories

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
    config = AlibiGPTConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None, pad_token_id=None,
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
        found = asyncio.run(_measure(url, given, looked))
        server.should_exit = True
        thread.join()
    result = {
        "command": " ".join(["python -m benchmarks.server", *(sys.argv[1:] if arguments is None else arguments)]),
        "surroundings": surroundings(torch.device("cpu")),
        "load_average": os.getloadavg()[0],
        **found,
    }
    write_json(given.out, result)
    print(json.dumps(found, indent=1))
    return result


async def _measure(url: str, given: Any, looked: list[float]) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await _stream(client, given.tokens)
        one, sixteen, shares = [], [], []
        for _ in range(given.rounds):
            one.append(await _rate(client, 1, given.tokens))
            sixteen.append(await _rate(client, 16, given.tokens))
            looked.clear()
            began = time.perf_counter()
            for _ in range(5):
                await _stream(client, given.tokens)
            shares.append(sum(looked) / (time.perf_counter() - began))
        before = _resident()
        firsts = await asyncio.gather(*(_stream(client, given.tokens) for _ in range(given.queued)))
        after = _resident()
    firsts.sort()
    return {
        "answer_tokens": given.tokens,
        "tokens_per_second_one_stream": statistics.median(one),
        "tokens_per_second_16_streams": statistics.median(sixteen),
        "throughput_16_over_1": statistics.median(many / few for many, few in zip(sixteen, one, strict=True)),
        "share_of_looking_up_a_memory": statistics.median(shares),
        "queued_clients": given.queued,
        "first_token_seconds": {"median": statistics.median(firsts), "p95": firsts[int(0.95 * len(firsts))]},
        "queued_seconds_in_all": _Last.took,
        "resident_mib": {"before": before, "peak": after},
    }


class _Last:
    took = 0.0


async def _stream(client: httpx.AsyncClient, tokens: int) -> float:
    """Seconds to the first token of an answer that reads memory; the whole answer is read."""
    body = {"messages": SAID, "max_tokens": tokens, "stream": True, "memory_id": "notes", "recall": 5}
    began, first = time.perf_counter(), 0.0
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line and not first:
                first = time.perf_counter() - began
    _Last.took = time.perf_counter() - began
    return first


async def _rate(client: httpx.AsyncClient, streams: int, tokens: int) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(_stream(client, tokens) for _ in range(streams)))
    return streams * tokens / (time.perf_counter() - began)


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

    for name in ("exists", "bank", "recall"):
        timed(name)


def _resident() -> float:
    """MiB that this process, server and clients alike, has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
