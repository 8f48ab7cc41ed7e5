"""Write what the documentation takes from the source: docs/recipe.md, and tables on other pages."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from result_tables import FOLDER, with_results

from longmem import LongMem
from longmem.errors import LongMemError
from longmem.evaluation.tables import Table, markdown
from longmem.modeling.families import Family
from longmem.store.disk import token_bytes

ROOT = Path(__file__).parents[1]
NOTE = "<!-- written by `make docs` from the source; edit that instead -->\n"
TABLE = re.compile(r"<!-- (sizes|families) -->\n.*?<!-- /\1 -->\n", re.DOTALL)


def main() -> None:
    docs, pictures = ROOT / "docs", dict[str, str]()
    pages = stale(pictures)
    if docs / "results.md" in pages:
        for old in (docs / FOLDER).glob("*.svg"):
            old.unlink()
        for picture, svg in pictures.items():
            (docs / picture).write_text(svg, encoding="utf-8")
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


def stale(pictures: dict[str, str] | None = None) -> dict[Path, str]:
    """The pages that are not what the source says, as they should be; ``pictures`` as in ``with_results``."""
    made, tables = {ROOT / "docs" / "recipe.md": recipe()}, {"sizes": sizes, "families": families}
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "models").glob("*/README.md")):
        page = with_results(path.read_text(encoding="utf-8"), pictures)
        page = TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{tables[found[1]]()}\n<!-- /{found[1]} -->\n", page)
        made.setdefault(path, page)
    return {path: text for path, text in made.items() if not path.exists() or path.read_text(encoding="utf-8") != text}


def recipe() -> str:
    """Every setting of a recipe, with its default and the string that stands behind it in the source."""
    from longmem.training import recipe as module

    classes = {
        node.name: node
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "Section" for base in node.bases)
    }
    top = classes.pop("Recipe")
    sections = {
        node.annotation.id: node.target.id
        for node in top.body
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.annotation, ast.Name)
        and isinstance(node.target, ast.Name)
    }
    choices = '`task` is `"pretrain"` or `"adapt"`, `method` of adaptation is `"longmem"` or `"memtrm"`'
    parts = [f"{NOTE}# Settings of a recipe\n\n{choices}; everything else has a default.\n"]
    for name, node in classes.items():
        doc = (ast.get_docstring(node) or "").replace("``", "`")
        parts.append(f"## [{sections[name]}]\n\n{doc}\n\n| setting | default | |\n|---|---|---|")
        parts.append("\n".join(_setting(*pair) for pair in _fields(node)) + "\n")
    return "\n".join(parts)


BACKBONES = {  # layers, key/value heads, head dimension, as the published configurations have them
    "GPT-2 (124M)": (12, 12, 64),
    "GPT-2 XL (1.5B)": (48, 25, 64),
    "GPT-2* of the paper (407M)": (24, 16, 64),
    "Pythia-410M": (24, 16, 64),
    "Pythia-6.9B": (32, 32, 128),
    "SmolLM2-135M": (30, 3, 64),
    "Qwen2.5-0.5B": (24, 2, 64),
    "Qwen2.5-7B": (28, 4, 128),
    "Qwen3-0.6B": (28, 8, 128),
    "Qwen3-8B": (36, 8, 128),
    "Llama-2-7B": (32, 32, 128),
    "Llama-3.2-1B": (16, 8, 64),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (80, 8, 128),
    "Mistral-7B": (32, 8, 128),
    "Gemma-2-2B": (26, 4, 256),
    "Gemma-2-9B": (42, 8, 256),
    "Phi-3-mini (3.8B)": (32, 32, 96),
}
TOKENS = {"65,536": 65_536, "1M": 1_000_000, "10M": 10_000_000}  # the paper's memory, a shelf of books, a library


def sizes() -> str:
    """The table of memory sizes."""
    heads = ["backbone", "KV heads", "fp16/token", "int8/token", "chunk keys/token", "full cache/token"]
    rows = []
    for name, (layers, heads_kv, dim) in BACKBONES.items():
        half, small = token_bytes(heads_kv, dim, "float16"), token_bytes(heads_kv, dim, "int8")
        by_token = (half["keys_values"], small["keys_values"], half["chunk_keys"], layers * 4 * heads_kv * dim)
        on_disk = (f"{_in_bytes(half['disk'] * n)} / {_in_bytes(small['disk'] * n)}" for n in TOKENS.values())
        rows.append([name, f"{heads_kv} x {dim}", *map(_in_bytes, by_token), *on_disk])
    table = Table([*heads, *(f"{name} tokens" for name in TOKENS)], rows)
    made = (
        "Bytes per token: keys and values in 16 and in 8 bits; mean keys of the chunks (4 tokens each, float32),\n"
        "which an open bank holds; a full cache of all layers in 16 bits, to compare.\n"
        "In all: on disk, in 16 / in 8 bits, text and token ids included."
    )
    return f"{markdown(table)}\n\n{made}"


def _in_bytes(number: float) -> str:
    """``4.0 KiB``, ``3.8 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def families() -> str:
    """What every configuration that the laws are tested on can do, tried out on a tiny model of it."""
    sys.path.insert(0, str(ROOT))
    from tests.family_table import FAMILIES, H, make_backbone

    lines = [
        "| tested as | `model_type` | heads, key/value heads | layers that can be remembered | `fusion` | `init` |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for name, (model_type, _) in FAMILIES.items():
        backbone = make_backbone(name)
        family = Family.of(backbone)
        allowed = family.memory_layers()
        layers = "all" if len(allowed) == len(family.layers) else "those with full attention"
        works = [_what_works(backbone, "fusion", ("gate", "softmax")), _what_works(backbone, "init", ("copy", "zero"))]
        cells = (name, f"`{model_type}`", f"{H}, {family.kv_heads(allowed[-1])}", layers, *works)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _what_works(backbone: Any, setting: str, values: tuple[str, ...]) -> str:
    works = []
    for value in values:
        with suppress(LongMemError):
            LongMem.from_backbone(backbone, **{setting: value})
            works.append(value)
    return ", ".join(works)


def _fields(node: ast.ClassDef) -> Iterator[tuple[ast.AnnAssign, str]]:
    for field, behind in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            said = behind.value.value if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) else ""
            yield field, str(said)


def _setting(field: ast.AnnAssign, said: str) -> str:
    default = ast.unparse(field.value) if field.value is not None else ""
    kind = ast.unparse(field.annotation)
    choices = re.match(r"Literal\[(.*?)\]", kind)
    text = " ".join(said.split()).replace("``", "`")
    if choices:
        text = f"One of {choices[1]}. {text}".replace("'", "`")
    return f"| `{ast.unparse(field.target)}` | `{default}` | {text.strip().replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    main()
