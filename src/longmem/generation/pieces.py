"""Token ids as text, piece by piece as they come."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_CONTEXT = 6  # tokens before, because some tokenizers spell a token by what stands before it
_UNFINISHED = "\ufffd"


class Pieces:
    """Spells tokens one at a time: what all pieces say together is what decoding at once says.

    A character whose bytes are spread over several tokens comes with the last of them.

    Args:
        tokenizer: of transformers.
        before: token ids of the text so far, which is not spelled again.
        skip_special_tokens: leave out ``</s>`` and its like.
    """

    def __init__(self, tokenizer: Any, before: Iterable[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._said = list(before)[-_CONTEXT:]
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """What this token adds; empty while a character is not whole."""
        self._waiting.append(token)
        text = self._added()
        if text.endswith(_UNFINISHED) and len(self._waiting) < _CONTEXT:
            return ""
        self._settle()
        return text

    def end(self) -> str:
        """What still waits, whole or not."""
        text = self._added() if self._waiting else ""
        self._settle()
        return text

    def _settle(self) -> None:
        self._said = [*self._said, *self._waiting][-_CONTEXT:]
        self._waiting = []

    def _added(self) -> str:
        return self._decode([*self._said, *self._waiting])[len(self._decode(self._said)) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))
