"""How long the local window is, and how much of it moves to memory when it is full."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longmem.errors import ConfigError


@dataclass(frozen=True)
class WindowPolicy:
    """The settings of ``LongMemGenerationConfig`` with nothing left open.

    Attributes:
        window: most tokens attended to directly.
        move: oldest tokens that move together.
        overlap: tokens before those that move that their keys and values see.
        session_tokens: most tokens that moved text takes in memory.
    """

    window: int
    move: int
    overlap: int
    session_tokens: int

    @classmethod
    def of(cls, settings: Any, model: Any, chunk_size: int) -> WindowPolicy | None:
        """The policy of a generation config for a model and a memory of this chunk size; None where nothing limits.

        Raises:
            ConfigError: lists every setting that breaks a rule.
        """
        window = getattr(settings, "window", None)
        if window is None:
            window = positions(model)
        if window is None:
            return None
        move = getattr(settings, "window_move", None)
        if move is None:
            move = max(chunk_size, window // 2 // chunk_size * chunk_size)
        overlap = getattr(settings, "window_overlap", 0)
        capacity = getattr(settings, "session_tokens", None)
        if capacity is None:
            capacity = model.config.memory_size // chunk_size * chunk_size
        problems = _problems(window, move, overlap, capacity, chunk_size, positions(model))
        if problems:
            raise ConfigError(problems)
        return cls(int(window), int(move), int(overlap), int(capacity))

    def pieces_over(self, local: int) -> int:
        """How many pieces must move so that ``local`` tokens fit the window."""
        return max(0, -(-(local - self.window) // self.move))


def positions(model: Any) -> int | None:
    """The longest text the backbone was made for; None where its architecture knows no limit."""
    config = model.backbone.model.config.get_text_config(decoder=True)
    found = getattr(config, "max_position_embeddings", None)
    return int(found) if isinstance(found, int) and found > 0 else None


def _problems(window: int, move: int, overlap: int, capacity: int, chunk: int, limit: int | None) -> list[str]:
    found = []
    if window < 2 * chunk:
        found.append(f"window ({window}) must hold two chunks of {chunk} tokens; try {2 * chunk}")
    elif limit is not None and window > limit:
        found.append(f"window ({window}) must not exceed the backbone's {limit} positions")
    if move < 1 or move % chunk:
        tries = max(chunk, round(move / chunk) * chunk)
        found.append(f"window_move ({move}) must be a multiple of the memory's chunk size ({chunk}); try {tries}")
    elif move >= window:
        found.append(f"window_move ({move}) must leave something in the window ({window}); try {window // 2}")
    if overlap < 0 or overlap + move > window:
        found.append(
            f"window_overlap ({overlap}) must lie in 0..{max(0, window - move)}, what is left of the window beside the "
            f"{move} tokens that move"
        )
    if capacity < chunk or capacity % chunk:
        tries = max(chunk, capacity // chunk * chunk)
        found.append(
            f"session_tokens ({capacity}) must be a multiple of the memory's chunk size ({chunk}); try {tries}"
        )
    return found
