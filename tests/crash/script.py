"""A long life of a store: random steps whose outcome is known, so that it can be killed at any moment and go on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.crash.forks import Say
from tests.crash.operations import State, read_state, small_steps
from tests.store.small import open_small, words

from longmem.store import MemoryStore, NewDocument

Step = dict[str, Any]


def random_steps(seed: int, count: int) -> list[Step]:
    """Steps that are all allowed; texts are shared between namespaces."""
    draw = random.Random(seed)
    alive: set[tuple[str, str]] = set()
    steps: list[Step] = [{"do": "compact"}]
    while len(steps) < count:
        namespace = draw.choice(["alice", "bob"])
        text = [draw.randrange(8), draw.choice([30, 90, 200, 420])]
        own = sorted(name for owner, name in alive if owner == namespace)
        kind = draw.choice(["add", "add", "many", "replace", "append", "forget", "forget", "compact", "reopen"])
        number = len(steps)
        if kind == "add":
            alive.add((namespace, f"{number}"))
            step = {"name": f"{number}", "text": text}
        elif kind == "many":
            step = {"names": [f"{number}.{each}" for each in range(3)], "text": text}
            alive.update((namespace, name) for name in step["names"])
        elif kind in ("replace", "append", "forget") and own:
            step = {"name": draw.choice(own), "text": text}
            if kind == "forget":
                alive.remove((namespace, step["name"]))
        elif kind in ("compact", "reopen"):
            step = {}
        else:
            continue
        steps.append({"do": kind, "namespace": namespace, "number": number, **step})
    return steps


def apply(store: MemoryStore, step: Step) -> Iterator[int]:
    """Do a step; says how many more promises it will make after each one."""
    kind, namespace = step["do"], step.get("namespace", "")
    text = words(*step["text"]) if "text" in step else ""
    moment = float(step.get("number", 0))
    if kind == "add":
        store.add_document(namespace, text, name=step["name"], time=moment)
    elif kind == "many":
        texts = [f"{text} {number}" for number in range(3)]
        new = [
            NewDocument(name, each, time=moment + at / 10)
            for at, (name, each) in enumerate(zip(step["names"], texts, strict=True))
        ]
        for left, _ in zip((2, 1, 0), store.add_documents(namespace, new), strict=True):
            yield left
        return
    elif kind == "replace":
        store.add_document(namespace, f"{text} again", name=step["name"], time=moment, replace=True)
    elif kind == "append":
        store.append(namespace, text, name=step["name"])
    elif kind == "forget":
        store.forget(namespace, name=step["name"])
    elif kind == "compact":
        store.compact()
    yield 0


@dataclass(frozen=True)
class Moment:
    """A state that the store may be in.

    Attributes:
        step, left: the promise that it came with.
        resume: the step to go on with.
    """

    step: int
    left: int
    state: State

    @property
    def resume(self) -> int:
        return self.step + (self.left == 0)


def moments_of(path: Path, steps: list[Step]) -> list[Moment]:
    """Every state of an undisturbed life."""
    moments = [Moment(-1, 0, None)]

    def note(what: Any) -> None:
        if what != "open":
            moments.append(Moment(*what, read_state(path)))

    live(note, str(path), steps, 0)
    return moments


def live(say: Say, path: str, steps: list[Step], begin: int) -> None:
    """Go on with a life from a step; says step and what ``apply`` says after every promise."""
    say("open")
    with small_steps():
        store = open_small(Path(path))
        for number in range(begin, len(steps)):
            if steps[number]["do"] == "reopen":
                store.close()
                store = open_small(Path(path))
            for left in apply(store, steps[number]):
                say([number, left])
        store.close()
