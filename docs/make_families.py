"""Write the table of families in docs/your-model.md from the models that the laws are tested on.

``python docs/make_families.py`` writes; ``--check`` writes nothing and fails where the page is not what it would write.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "your-model.md"
TABLE = re.compile(r"<!-- families -->\n.*?<!-- /families -->\n", re.DOTALL)


def main() -> None:
    page = PAGE.read_text(encoding="utf-8")
    made = TABLE.sub(lambda _: f"<!-- families -->\n{table()}<!-- /families -->\n", page)
    if "--check" in sys.argv[1:]:
        sys.exit(0 if made == page else "docs/your-model.md is not up to date; run make docs")
    PAGE.write_text(made, encoding="utf-8")


def table() -> str:
    """What every tested configuration can do, tried out on a tiny model of it."""
    sys.path.insert(0, str(ROOT))
    from tests.family_table import FAMILIES, H, make_backbone

    from longmem.modeling.families import Family

    lines = [
        "| tested as | `model_type` | heads, key/value heads | layers that can be remembered | `fusion` | `init` |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, (model_type, _) in FAMILIES.items():
        backbone = make_backbone(name)
        family = Family.of(backbone)
        allowed = family.memory_layers()
        layers = "all" if len(allowed) == len(family.layers) else "those with full attention"
        fusion = _what_works(backbone, "fusion", ("gate", "softmax"))
        init = _what_works(backbone, "init", ("copy", "zero"))
        heads = f"{H}, {family.kv_heads(allowed[-1])}"
        lines.append(f"| {name} | `{model_type}` | {heads} | {layers} | {fusion} | {init} |")
    return "\n".join(lines) + "\n"


def _what_works(backbone: object, setting: str, values: tuple[str, ...]) -> str:
    from longmem import LongMem
    from longmem.errors import LongMemError

    works = []
    for value in values:
        try:
            LongMem.from_backbone(backbone, **{setting: value})  # type: ignore[arg-type]
        except LongMemError:
            continue
        works.append(value)
    return ", ".join(works)


if __name__ == "__main__":
    main()
