"""What can be wrong with a recipe, one line each: the value, the rule and the way out."""

from __future__ import annotations

import difflib
import tomllib
from typing import Any

from pydantic import BaseModel, ValidationError

from longmem.data.facts import KINDS

GONE = {
    "optim.segments": "take optim.accumulate instead: memory is written after each of its parts",
}
"""Settings of earlier versions, and what replaced them."""


def contradictions(recipe: Any) -> list[str]:
    """Every broken rule between settings, one line each."""
    data, model, side, optim = recipe.data, recipe.model, recipe.sidenet, recipe.optim
    found = []
    if not data.paths:
        found.append("data.paths is empty; name files, folders, .jsonl, .tar.xz or hub:NAME to train on")
    if data.valid and data.held_out:
        found.append("data.held_out and data.valid are both set; keep one of them")
    if recipe.task == "adapt":
        if recipe.backbone.path is None:
            found.append("backbone.path is missing; name a folder or hub id of a causal language model")
        for name in ("num_retrieved", "memory_size"):
            value, chunk = getattr(side, name), side.chunk_size
            if value % chunk:
                below = value - value % chunk
                tries = f"{below} or {below + chunk}" if below else f"{chunk}"
                rule = f"must be a multiple of sidenet.chunk_size ({chunk})"
                found.append(f"sidenet.{name} ({value}) {rule}; try {tries}")
        for name in ("quantised", "device_map"):
            if (value := getattr(recipe.backbone, name)) is None:
                continue
            if recipe.method == "memtrm":
                found.append(
                    f"backbone.{name} ({value!r}) is for a frozen backbone, and method = 'memtrm' trains it; "
                    "leave it away"
                )
            if optim.parallel == "fsdp":
                found.append(
                    f"backbone.{name} ({value!r}) and optim.parallel = 'fsdp' both divide the backbone; keep one"
                )
        if recipe.method == "memtrm" and optim.parallel == "fsdp":
            found.append(
                "optim.parallel = 'fsdp' cannot divide a MemTRM, which trains what writes its memory; use 'ddp'"
            )
        found += _needle_problems(recipe)
        if side.start is not None and recipe.method == "memtrm":
            found.append(f"sidenet.start ({side.start!r}) is a SideNet, and method = 'memtrm' has none; leave it away")
        if side.shared and side.boundary == "reset":
            found.append(
                "sidenet.boundary is 'reset' with sidenet.shared; their rows end at different times, use 'keep'"
            )
    if recipe.task == "pretrain" and model.init is None and model.hidden_size % model.heads:
        found.append(
            f"model.hidden_size ({model.hidden_size}) must be a multiple of model.heads ({model.heads}); "
            f"try {model.hidden_size // model.heads * model.heads + model.heads}"
        )
    if optim.steps is None and optim.tokens is None and optim.max_minutes is None:
        found.append("optim.steps, optim.tokens and optim.max_minutes are all missing; set one as the budget")
    if optim.steps is not None and optim.tokens is not None:
        found.append(f"optim.steps ({optim.steps}) and optim.tokens ({optim.tokens}) are both set; keep one of them")
    if optim.schedule_by == "time" and optim.max_minutes is None:
        found.append("optim.schedule_by is 'time' but optim.max_minutes is missing; set it")
    only_time = optim.max_minutes is not None and optim.steps is None and optim.tokens is None
    if optim.schedule_by == "tokens" and only_time:
        found.append("optim.schedule_by is 'tokens' without optim.tokens or optim.steps; set one, or use 'time'")
    if recipe.task == "pretrain" and recipe.method != "longmem":
        found.append(f"method ({recipe.method!r}) is for task = 'adapt'; pre-training has no memory")
    if recipe.task == "adapt" and optim.compile:
        found.append("optim.compile is for task = 'pretrain'; adaptation hooks into its backbone, set it to false")
    if recipe.eval.best or recipe.eval.patience:
        if recipe.eval.every == 0:
            found.append("eval.best and eval.patience need evaluations while training; set eval.every")
        elif recipe.eval.best and (recipe.checkpoint.every == 0 or recipe.checkpoint.every % recipe.eval.every):
            found.append(
                f"checkpoint.every ({recipe.checkpoint.every}) must be a multiple of eval.every ({recipe.eval.every}) "
                "where eval.best is true; the best weights are taken from a checkpoint"
            )
    if optim.warmup + (optim.decay_fraction if optim.schedule == "wsd" else 0) > 1:
        found.append(f"optim.warmup ({optim.warmup}) and optim.decay_fraction ({optim.decay_fraction}) exceed the run")
    return found


def _needle_problems(recipe: Any) -> list[str]:
    """Of [needles], where it is used."""
    needles, window, chunk = recipe.needles, recipe.data.window, recipe.sidenet.chunk_size
    if not needles.share:
        return []
    found = [
        f"needles.kinds ({kind!r}) must be among {', '.join(KINDS)}" for kind in needles.kinds if kind not in KINDS
    ]
    if not needles.kinds:
        found.append(f"needles.kinds is empty; name some of {', '.join(KINDS)}")
    if needles.least_tokens > needles.most_tokens:
        found.append(
            f"needles.least_tokens ({needles.least_tokens}) must not exceed most_tokens ({needles.most_tokens})"
        )
    found += [
        f"{name} ({value}) must be a multiple of sidenet.chunk_size ({chunk}) where needles.share is set"
        for name, value in (("data.window", window), ("needles.context", needles.context))
        if value % chunk
    ]
    if not recipe.sidenet.memory:
        found.append("needles.share needs memory; set sidenet.memory to true or needles.share to 0")
    if recipe.method == "memtrm":
        found.append("needles.share is for a frozen backbone, whose memory stays valid; method = 'memtrm' trains it")
    if recipe.optim.parallel == "fsdp":
        found.append("needles.share and optim.parallel = 'fsdp' do not go together yet; use 'ddp'")
    return found


def override(settings: dict[str, Any], text: str) -> str | None:
    """Set one value; returns the problem if it cannot be."""
    name, equals, value = text.partition("=")
    *tables, key = name.strip().split(".")
    if not equals or not key:
        return f"--set {text} is not section.name=value; write e.g. --set optim.lr=1e-3"
    table = settings
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            return f"--set {text}: {part} is a value, not a section"
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
        rule = rule.replace(" valid integer", "n integer").replace(" valid ", " ")
        if details["type"] == "missing":
            start, rule = f"{name} is missing; ", "set task = 'pretrain' or 'adapt'"
        elif details["type"] == "extra_forbidden":
            near = _nearest(name, recipe)
            start = f"{name} is no setting{' any more' if name in GONE else ''}; "
            rule = GONE.get(name, f"did you mean {near}?" if near else "remove it")
        found.setdefault(name, (start, []))[1].append(rule)
    return [start + ", or ".join(rules) for start, rules in found.values()]


def _nearest(name: str, recipe: type[BaseModel]) -> str | None:
    """The known setting most like an unknown one: in its own section, by its own name in any, or by both."""
    known = ["task", "method"]
    for section, field in recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            known += [section, *(f"{section}.{key}" for key in field.annotation.model_fields)]
    section, _, key = name.rpartition(".")
    own = [each for each in known if section and each.startswith(f"{section}.")]
    elsewhere = [each for each in known if each.endswith(f".{key}")]
    found = difflib.get_close_matches(name, own, n=1, cutoff=0.7) or elsewhere
    return next(iter(found or difflib.get_close_matches(name, known, n=1, cutoff=0.6)), None)


def without(settings: dict[str, Any], places: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of the settings that lacks the named ones (``task`` falls back to ``pretrain``)."""
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for section, *name in places:
        inside = copy.get(str(section))
        if name and isinstance(inside, dict):
            inside.pop(str(name[0]), None)
        else:
            copy.pop(str(section), None)
    copy.setdefault("task", "pretrain")
    return copy
