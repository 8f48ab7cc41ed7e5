"""The worker: every accepted call ends, nobody waits for another's long answer, and giving way changes no text."""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from longmem.server.engine import Engine, Job
from longmem.server.requests import Refused


@pytest.fixture
def run(tiny: Any) -> Any:
    """``run(of)`` awaits ``of(engine)``, and closes the engine."""

    def running(of: Callable[[Engine], Any], **settings: int) -> None:
        engine = Engine(tiny, **{"rows": 4, **settings})
        asyncio.run(asyncio.wait_for(of(engine), 120))
        engine.close()
        assert not engine._thread.is_alive() and not engine.waiting

    return running


def job(tokens: int, *, seed: int = 0, memory: Any = None) -> Job:
    return Job(ids=[40 + seed, 50, 60], memory=memory, max_tokens=tokens, seed=seed)


async def read(engine: Engine, given: Job) -> list[int]:
    return [token.id async for _, token in engine.generate([given]) if token is not None]


def failing() -> Any:
    raise OSError("gone")


def test_one_that_fails_ends_alone_and_a_model_that_fails_ends_its_batch(run: Any) -> None:
    async def of(engine: Engine) -> None:
        some = [read(engine, job(9, seed=seed, memory=failing if seed == 1 else None)) for seed in range(4)]
        found = await asyncio.gather(*some, return_exceptions=True)
        assert [type(each) for each in found] == [list, OSError, list, list]
        with pytest.raises(OSError, match="gone"):
            await engine.call(failing)
        with patch.object(type(engine.model), "generate", lambda *_, **__: 1 / 0):
            found = await asyncio.gather(*(read(engine, job(3)) for _ in range(6)), return_exceptions=True)
            assert all(isinstance(each, ZeroDivisionError) for each in found)
        assert len(await read(engine, job(3))) == 3

    run(of)


@pytest.mark.parametrize("seed", range(3))
def test_every_accepted_call_ends_also_when_the_engine_closes(run: Any, seed: int) -> None:
    draw = random.Random(seed)

    async def one(engine: Engine, number: int) -> Any:
        await asyncio.sleep(draw.random() * 0.4)
        kind = draw.choice(["job", "leaves", "call", "fails"])
        if kind == "call":
            return await engine.call(lambda: number)
        if kind == "leaves":
            tokens = engine.generate([job(500, seed=number % 50)])
            await anext(tokens)
            await tokens.aclose()
            return None
        return await read(engine, job(draw.randrange(1, 40), memory=failing if kind == "fails" else None))

    async def of(engine: Engine) -> None:
        closing = threading.Timer(0.2, engine.close)
        closing.start()
        found = await asyncio.gather(*(one(engine, number) for number in range(80)), return_exceptions=True)
        closing.join()
        assert {type(each) for each in found} <= {int, list, type(None), OSError, Refused}
        assert any(isinstance(each, list) for each in found) and any(isinstance(each, Refused) for each in found)

    run(of, most_waiting=40)


def test_a_full_queue_refuses_but_not_what_ends_an_accepted_request(run: Any) -> None:
    async def of(engine: Engine) -> None:
        begun, free = threading.Event(), threading.Event()
        held = asyncio.create_task(engine.call(lambda: begun.set() or free.wait(30)))
        await asyncio.to_thread(begun.wait, 30)
        waiting = [asyncio.create_task(read(engine, job(1))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="busy") as told:
            await engine.call(time.time)
        assert told.value.headers and told.value.headers["Retry-After"]
        last = asyncio.create_task(engine.call(lambda: 1, follows=True))
        await asyncio.sleep(0.01)
        free.set()
        assert await last == 1 and await held and len(await asyncio.gather(*waiting)) == 2

    run(of, rows=1, most_waiting=2)
