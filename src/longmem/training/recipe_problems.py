"""What can be wrong with a recipe, one line each: the value, the rule and the way out."""

from __future__ import annotations

import tomllib
from operator import attrgetter
from typing import Any

from pydantic import BaseModel, ValidationError

from longmem.config import nearest
from longmem.errors import ConfigError, not_a_multiple

CONFLICTS = (
    ("data.valid", "data.held_out", "keep one of them"),
    ("optim.steps", "optim.tokens", "keep one of them"),
    ("optim.compile", "task = adapt", "adaptation hooks into its backbone; set it to false"),
    ("optim.gradient_checkpointing", "task = pretrain", "only a SideNet is recomputed; take fewer optim.rows"),
    ("optim.gradient_checkpointing", "method = memtrm", "only a SideNet is recomputed; take fewer optim.rows"),
    ("method = memtrm", "task = pretrain", "pre-training has no memory; leave method away"),
    ("method = memtrm", "optim.parallel = fsdp", "a MemTRM trains what writes its memory; use 'ddp'"),
    ("backbone.quantised", "method = memtrm", "a MemTRM trains its backbone; leave it away"),
    ("backbone.device_map", "method = memtrm", "a MemTRM trains its backbone; leave it away"),
    ("backbone.quantised", "optim.parallel = fsdp", "both divide the backbone; keep one of them"),
    ("backbone.device_map", "optim.parallel = fsdp", "both divide the backbone; keep one of them"),
    ("sidenet.start", "method = memtrm", "a MemTRM has no SideNet; leave it away"),
    ("needles.kinds", "sidenet.memory = False", "facts are hidden in memory; set one of them otherwise"),
    ("needles.kinds", "method = memtrm", "facts are encoded once, by a backbone that stays as it is; leave one away"),
    ("needles.kinds", "optim.parallel = fsdp", "facts are not encoded by divided backbones; use 'ddp'"),
    ("eval.best", "eval.every = 0", "the best weights are those of an evaluation; set eval.every"),
    ("eval.best", "checkpoint.every = 0", "the best weights are taken from a checkpoint; set checkpoint.every"),
    ("eval.patience", "eval.every = 0", "patience counts evaluations; set eval.every"),
)
"""Settings that exclude each other, and why or what to do: ``name`` holds where it is set, ``name = value`` where it is
just that."""


def broken_rules(recipe: Any) -> list[str]:
    """Rules between settings; of each broken one the values, the rule and the way out."""
    optim, needles, adapt = recipe.optim, recipe.needles, recipe.task == "adapt"
    found = []
    if not recipe.data.paths:
        found.append("data.paths is empty; name files, folders, .jsonl, .tar.xz or hub:NAME to train on")
    if adapt and recipe.backbone.path is None:
        found.append("backbone.path is missing; name a folder or hub id of a causal language model")
    if optim.steps is None and optim.tokens is None and optim.max_minutes is None:
        found.append("optim.steps, optim.tokens and optim.max_minutes are all missing; set one as the budget")
    for one, other, way_out in CONFLICTS:
        if (first := _named(recipe, one)) and (second := _named(recipe, other)):
            found.append(f"{first} and {second} do not go together: {way_out}")
    if not adapt and recipe.data.repeat_fraction and recipe.data.window < 3:
        found.append(
            f"data.window ({recipe.data.window}) is too small for a passage and its repetition (data.repeat_fraction); "
            "take at least 3"
        )
    if needles.kinds and needles.least_tokens > needles.most_tokens:
        least, most = needles.least_tokens, needles.most_tokens
        found.append(f"needles.least_tokens ({least}) must not exceed needles.most_tokens ({most})")
    multiples = [
        (needles.kinds, "data.window", "sidenet.chunk_size"),
        (needles.kinds, "needles.context", "sidenet.chunk_size"),
        (not adapt, "model.hidden_size", "model.heads"),
        # the best weights are taken from a checkpoint
        (recipe.eval.best and recipe.eval.every, "checkpoint.every", "eval.every"),
    ]
    for asked, name, of in multiples:
        if asked:
            found += not_a_multiple(name, attrgetter(name)(recipe), of, attrgetter(of)(recipe))
    if adapt:
        layers = {} if recipe.sidenet.memory_layers != "auto" else {"memory_layers": None}
        try:
            recipe.config_class(**recipe.model_settings | layers)
        except ConfigError as error:
            found += [f"sidenet.{problem}" for problem in error.problems]
    if optim.schedule == "wsd" and optim.warmup + optim.decay_fraction > 1:
        found.append(f"optim.warmup ({optim.warmup}) and optim.decay_fraction ({optim.decay_fraction}) exceed the run")
    return found


def _named(recipe: Any, condition: str) -> str | None:
    """The setting of a condition with its value, where the condition holds."""
    name, _, wanted = condition.partition(" = ")
    value = attrgetter(name)(recipe)
    return f"{name} ({value!r})" if (str(value) == wanted if wanted else value) else None


def override(settings: dict[str, Any], text: str) -> str | None:
    """Set one value; returns the problem if it cannot be."""
    name, equals, value = text.partition("=")
    section, _, key = name.strip().rpartition(".")
    if not equals or not key:
        return f"--set {text} is not section.name=value; write e.g. --set optim.lr=1e-3"
    table = settings.setdefault(section, {}) if section else settings
    if not isinstance(table, dict):
        return f"--set {text}: {section} is a value, not a section"
    other = {"memory_layer": "memory_layers", "memory_layers": "memory_layer"}.get(key, "")
    table.pop(other, None)  # two names of one setting
    try:
        table[key] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[key] = value.strip()
    return None


def lines(error: ValidationError, recipe: type[BaseModel]) -> list[str]:
    """Pydantic's problems in the words of the recipe, one line for each setting."""
    found: dict[str, tuple[str, list[str]]] = {}
    for details in error.errors():
        # what follows section and name is a place inside a list, or which one of several allowed types was tried
        name = ".".join(map(str, details["loc"][:2]))
        start, rule = f"{name} ({details['input']!r}) ", details["msg"].replace("Input should", "should")
        rule = rule.replace(" valid integer", "n integer").replace(" valid ", " ").replace("tuple", "list")
        rule = rule.replace("Input is not a path for <class 'pathlib.Path'>", "should be a path, in quotes")
        if details["type"] == "missing":
            start, rule = f"{name} is missing; ", "set task = 'pretrain' or 'adapt'"
        elif details["type"] == "extra_forbidden":
            start, rule = f"{name} is no setting; ", _nearest(name, recipe)
        found.setdefault(name, (start, []))[1].append(rule)
    return [start + ", or ".join(rules) for start, rules in found.values()]


def _nearest(name: str, recipe: type[BaseModel]) -> str:
    """Points from an unknown setting to one of its own name elsewhere, or to the one that is spelled most like it."""
    sections = {
        section: getattr(field.annotation, "model_fields", {}) for section, field in recipe.model_fields.items()
    }
    known = [*sections, *(f"{section}.{key}" for section, fields in sections.items() for key in fields)]
    same = [each for each in known if each.endswith("." + name.rpartition(".")[2])]
    return (f"did you mean {same[0]}?" if same else nearest(name, known).removeprefix("; ")) or "remove it"


def without(settings: dict[str, Any], error: ValidationError) -> dict[str, Any]:
    """A copy of the settings that lacks the wrong ones (``task`` falls back to ``pretrain``)."""
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in settings.items()}
    for section, *name in (details["loc"] for details in error.errors()):
        if name:
            copy[str(section)].pop(name[0], None)
        else:
            copy.pop(str(section), None)
    return {"task": "pretrain", **copy}
