"""Saved banks of several processes, their rows dealt out anew to another number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longmem.errors import CheckpointError


def rows_of(states: Sequence[dict[str, Any]], first: int, count: int) -> dict[str, Any]:
    """The state of a bank that holds rows ``first`` to ``first + count`` of all these banks, counted through.

    Args:
        states: ``MemoryBank.state_dict()`` or ``LookaheadBank.state_dict()`` of every process, in their order.
        first: row to begin with.
        count: rows to take.

    Raises:
        CheckpointError: the banks were shared by the rows of their process, which cannot be told apart.
    """
    if "bank" in states[0]:
        floors = [floor for state in states for floor in state["floor"]]
        return {
            "bank": rows_of([state["bank"] for state in states], first, count),
            "floor": floors[first : first + count],
        }
    settings = states[0]["settings"]
    if settings["shared"]:
        raise CheckpointError(
            f"with sidenet.shared a process has one memory for its {settings['rows']} rows, and cannot be divided; "
            f"start {len(states)} processes, as many as wrote it"
        )
    places = [(state, row) for state in states for row in range(state["settings"]["rows"])][first : first + count]
    return {
        "settings": {**settings, "rows": count},
        "slots": _slots([(state["slots"], row) for state, row in places]),
        "tail": torch.stack([state["tail"][row] for state, row in places]),
        "lanes": [dict(state["lanes"][row]) for state, row in places],
        "version": max(state["version"] for state in states),
    }


def _slots(places: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    used = max(slots["storage"].shape[1] for slots, _ in places)
    return {
        "storage": torch.stack([_filled(slots["storage"][row], 0, used) for slots, row in places]),
        "keys": torch.stack([_filled(slots["keys"][row], 1, used) for slots, row in places]),
        "lengths": torch.stack([_filled(slots["lengths"][row], 0, used) for slots, row in places]),
        "written": [slots["written"][row] for slots, row in places],
        "ledger": _ledger([(slots["ledger"], row) for slots, row in places]),
    }


def _ledger(places: list[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """Every bank numbers the names of its documents by itself."""
    names: dict[str, int] = {}
    documents = []
    for ledger, row in places:
        spelled = {number: name for name, number in ledger["names"].items()}
        numbers = ledger["document"][row].clone()
        for number in torch.unique(numbers).tolist():
            if number in spelled:
                new = names.setdefault(spelled[number], len(names))
                numbers[ledger["document"][row] == number] = new
        documents.append(numbers)
    rest = {name: torch.stack([ledger[name][row] for ledger, row in places]) for name in ("start", "number", "time")}
    return {"document": torch.stack(documents), **rest, "names": names, "next": len(names)}


def _filled(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With zeros behind, up to ``size`` along ``dim``."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = [*tensor.shape]
    shape[dim] = missing
    return torch.cat((tensor, tensor.new_zeros(shape)), dim)
