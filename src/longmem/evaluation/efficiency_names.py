"""Names of the systems whose time and memory is measured."""

from __future__ import annotations

LONGMEM, FULL, WINDOWED = "longmem", "full", "windowed"

LABELS = {
    LONGMEM: "LongMem, context beyond the window in memory",
    FULL: "full attention (SDPA, key/value cache)",
    WINDOWED: "backbone alone, the window only",
}
SHORT = {LONGMEM: "LongMem", FULL: "full attention", WINDOWED: "window only"}
