"""Generated text as a page: every token shaded by its share of memory, every text put in as text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from longmem.generation.explained import ExplainedToken


def page(model: str, memory: str, prompt: str, tokens: Sequence[ExplainedToken]) -> str:
    """HTML without outside parts.

    Args:
        model: its name.
        memory: what it read, in words.
        prompt: what stood before the new tokens.
        tokens: the new ones.
    """
    data = {"model": model, "memory": memory, "prompt": prompt, "tokens": [asdict(token) for token in tokens]}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for sign in "<>&\u2028\u2029":  # no text may end the element it stands in
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return (files("longmem.generation") / "page.html").read_text(encoding="utf-8").replace("__DATA__", text)
