"""Server processes that are stopped and killed: what was acknowledged stays, what is of others never shows."""

import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
from benchmarks.isolation import Process, many_users

from longmem import MemoryStore


def test_nothing_acknowledged_is_lost_and_nothing_of_others_is_shown(tmp_path: Path, pair: Path) -> None:
    """``python -m benchmarks.isolation`` is the same with 50 users."""
    process = Process(tmp_path, pair, 8)
    try:
        process.begin()
        found = many_users(process, 8, 3, (signal.SIGKILL,))
        known = found["acknowledged"]
        assert found["compared_at_the_end"] == sum(known.values()) - known["responses"]
        assert known["documents"] >= 4 and known["forgotten"] and known["conversations"]
        assert process.stop(signal.SIGTERM) in (0, -signal.SIGTERM)
    finally:
        process.close()


def test_what_was_accepted_before_the_end_is_done_and_answered(
    start: Any, tmp_path: Path, made_text: Callable[..., str]
) -> None:
    with ThreadPoolExecutor(6) as pool, start(tmp_path) as live:
        url, headers = f"{live.url}/v1/memories/{live.memory('kept')}/documents", live.http().headers
        bodies = [{"name": f"d{number}", "text": made_text(3000, number)} for number in range(6)]
        answers = [pool.submit(httpx.post, url, json=body, headers=headers, timeout=90) for body in bodies]
        while httpx.get(f"{live.url}/health").json()["waiting"] < 5:
            time.sleep(0.005)
    assert [answer.result().status_code for answer in answers] == [201] * 6
    with MemoryStore.open(tmp_path / "store", mode="read", create=False) as store:
        assert len(store.documents("ann/kept")) == 6
