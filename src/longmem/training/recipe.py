"""Recipes: a training run as a TOML file, read into typed sections.

``longmem train RECIPE.toml --set section.name=value``. Every problem of a recipe is reported, in one error.
"""

from __future__ import annotations

import difflib
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from longmem.data.facts import KINDS
from longmem.data.text import TEXT_SUFFIXES, TextSource, WaysOut
from longmem.errors import ConfigError

Share = typing.Annotated[float, Field(ge=0, le=1)]
Count = typing.Annotated[int, Field(ge=1)]
CountOrZero = typing.Annotated[int, Field(ge=0)]
Positive = typing.Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """A table of a recipe; a key it does not know is a mistake, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RunSection(Section):
    """What the run is called and where its files go."""

    name: str = "run"
    """Names the folder, and the progress bar."""
    out_dir: Path | None = None
    """None: ``runs/NAME``. Holds metrics.jsonl, checkpoints/, final/ and the tokenizer."""
    seed: int = 1
    """Of fresh weights, dropout, the order of windows and documents."""


class DataSection(Section):
    """Text and how it becomes rows."""

    paths: tuple[str, ...] = ()
    """Training text, see ``TextSource.paths``."""
    valid: tuple[str, ...] = ()
    """Text for the losses of [eval]; may be empty."""
    held_out: tuple[str, ...] = ()
    """Patterns of document ids in ``paths`` that are kept for validation and not trained on."""
    suffixes: tuple[str, ...] = TEXT_SUFFIXES
    """What counts as text inside folders and archives."""
    include: tuple[str, ...] = ()
    """Patterns of document ids to train on; empty takes all."""
    exclude: tuple[str, ...] = ()
    """Patterns of document ids that are left out everywhere."""
    field: str = "text"
    """Text field of JSON lines and hub records."""
    documents: Literal["file", "folder"] = "file"
    """folder: the files below each top folder are one document."""
    undecodable: Literal["error", "skip", "replace"] = "error"
    """What happens to a file that is not UTF-8."""
    tokenizer: str | None = None
    """Folder or hub id. None: pre-training learns one of ``vocab_size``, adaptation takes the backbone's."""
    vocab_size: Count = 8192
    """Of the tokenizer that pre-training learns."""
    tokenizer_bytes: Count = 64_000_000
    """How much text the tokenizer learns from."""
    window: Count = 1024
    """T: tokens of a pre-training row, and of an adaptation segment."""
    piece_tokens: CountOrZero = 0
    """Adaptation: deal out longer documents in pieces of so many tokens; 0 keeps them whole."""
    repeat_fraction: Share = 0.0
    """Pre-training: share of rows that are copy practice, see ``WindowSampler``. Not in the paper."""
    repeat_random: Share = 0.25
    """Share of random-token rows among the practice rows."""
    cache_dir: Path | None = None
    """Where token ids are kept between runs; None: ``cache`` beside the run's folder."""


class ModelSection(Section):
    """Pre-training: shape of the ``AlibiGPT``."""

    hidden_size: Count = 256
    """C, the width."""
    layers: Count = 8
    """Decoder layers."""
    heads: Count = 8
    """H; the width must be a multiple. The more, the more ALiBi slopes that look far back."""
    intermediate_size: Count | None = None
    """Width of the feed-forward; None: four times the hidden size."""
    vocab_size: Count | None = None
    """Rows of embedding and head; None: as many as the tokenizer has tokens."""
    activation: str = "gelu_new"
    """Of the feed-forward."""
    layer_norm_epsilon: Positive = 1e-6
    """Of every norm."""
    init: str | None = None
    """Folder or hub id of a model to go on from, instead of fresh weights."""


class BackboneSection(Section):
    """Adaptation: the model that is given a memory."""

    path: str | None = None
    """Folder or hub id of any causal language model."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Of its weights; None: bfloat16 where they are frozen and a GPU computes in it, else float32; auto: as stored."""
    quantised: Literal["8bit", "4bit"] | None = None
    """Load a frozen backbone so, with bitsandbytes; the SideNet is copied from what its weights then stand for."""
    device_map: str | None = None
    """Spread a frozen backbone over the devices of one process: auto, balanced, sequential. None: it is on one."""


class SideNetSection(Section):
    """Adaptation: the SideNet and its memory. With ``method = "memtrm"`` what is said of memory holds all the same."""

    memory_layer: CountOrZero | Literal["auto"] | None = None
    """Backbone layer that is remembered, 0-based; None: three quarters of the depth."""
    start: str | None = None
    """SideNet checkpoint to go on from, over the same backbone; layers, fusion and gates are then its own."""
    stride: Count = 2
    """Backbone layers for each SideNet layer; MemTRM has none, as it has no init and no final_state."""
    init: Literal["copy", "zero"] = "copy"
    """copy: of the backbone's layers (paper); zero: the same, starting at exactly the backbone's perplexity."""
    fusion: Literal["gate", "softmax"] = "gate"
    """gate: one share per head (paper); softmax: every token chooses its own."""
    gate: typing.Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of its output that a head takes from memory when training begins; the paper's is half."""
    final_state: Literal["pre_norm", "normed"] | None = None
    """None: as the backbone's family does it."""
    chunk_size: Count = 4
    """S, tokens per chunk."""
    num_retrieved: Count = 64
    """K, tokens that each token and head reads; a multiple of S."""
    memory_size: Count = 65536
    """M, tokens that each row keeps; a multiple of S."""
    memory: bool = True
    """False: the control, the same SideNet, or backbone, trained without any memory."""
    shared: bool = False
    """One memory for all rows, as in the released code; rows then read each other's text."""
    boundary: Literal["keep", "reset"] = "keep"
    """What a row's memory does when its next text begins."""
    memory_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of stored keys and values; None: bfloat16 where a GPU computes in it, else float32."""


class OptimSection(Section):
    """Optimiser, schedule, budget, precision."""

    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the 2-D weights inside the layers, AdamW for the rest; see ``muon.py``."""
    lr: Positive = 2e-4
    """Peak learning rate of what AdamW trains."""
    muon_lr: Positive = 0.02
    """Learning rate of the weights that Muon trains."""
    muon_momentum: Share = 0.95
    """Of the running gradient."""
    gate_lr: Positive | None = None
    """Learning rate of the memory gates; None: ``lr``."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of AdamW."""
    eps: Positive = 1e-6
    """Of AdamW."""
    weight_decay: typing.Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; norms, biases and gates do not decay."""
    schedule: Literal["polynomial", "cosine", "wsd", "constant"] = "polynomial"
    """All but constant end at a rate of zero; wsd is flat until its decay."""
    power: Positive = 1.0
    """Of the polynomial decay to zero; 1 is linear, the paper's."""
    decay_fraction: Share = 0.3
    """wsd: share of the run, at its end, over which the rate falls linearly to zero."""
    warmup: Share = 0.02
    """Share of the run over which the rate rises linearly from zero."""
    schedule_by: Literal["tokens", "time"] = "tokens"
    """What the schedule follows: the token budget, or ``max_minutes``."""
    steps: Count | None = None
    """The budget in optimiser steps; or give tokens."""
    tokens: Count | None = None
    """The budget in tokens of all rows and processes; or give steps."""
    max_minutes: Positive | None = None
    """Stop cleanly after so long, over all resumed parts of the run."""
    rows: Count = 8
    """Rows per process and forward pass."""
    segments: Count = 1
    """Adaptation: consecutive segments of each row per forward pass, each reading what lay before it: fewer rows, and
    so fewer memories, fill a device. Trains what as many ``accumulate``d passes do, within rounding."""
    accumulate: Count = 1
    """Forward passes per optimiser step."""
    clip: typing.Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    dropout: typing.Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the layers that are trained."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32. Many CPUs emulate bf16, many times slower."""
    gradient_checkpointing: bool = False
    """Recompute the trained layers in backward: less memory, more time."""
    compile: bool = False
    """torch.compile the pre-trained model; needs a C++ compiler on a CPU."""
    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """Several processes: ddp, the whole model in each; fsdp, weights and optimiser divided among them (FSDP2). auto: as
    `accelerate launch` was told, else ddp."""
    threads: CountOrZero = 0
    """CPU threads; 0 leaves torch's choice."""


class NeedlesSection(Section):
    """Adaptation to facts hidden in memory, see ``NeedleAdaptation``. Not in the paper."""

    share: Share = 0.0
    """Share of the steps that ask for hidden facts; the others read text as ever. 0: none."""
    kinds: tuple[str, ...] = ("passkey",)
    """Of facts: passkey, pair, multi, twohop."""
    rows: Count = 32
    """Questions of such a step."""
    repeats: Count = 4
    """In how many steps, one after the other, each question is asked; its facts are encoded once."""
    context: Count = 64
    """Tokens of a segment that facts are hidden in; each fact gets two."""
    text_tokens: Count = 131072
    """Tokens of training text that are encoded before training, and then stand in memory beside the facts."""
    least_tokens: Count = 1024
    """How many of them stand there at first ..."""
    most_tokens: Count = 65536
    """... and at the end."""
    grows: CountOrZero = 200
    """Steps over which that number grows; 0: it is the largest from the beginning."""


class CheckpointSection(Section):
    """Resumable states."""

    every: CountOrZero = 1000
    """Steps between checkpoints; 0 writes one only when the run is stopped."""
    keep_last: Count = 2
    """How many are kept."""


class LogSection(Section):
    """What is told, and how often."""

    every: Count = 10
    """Steps between log lines."""
    tensorboard: bool = False
    """Also write TensorBoard files."""


class EvalSection(Section):
    """Losses on ``data.valid`` while training."""

    every: CountOrZero = 500
    """Steps between evaluations; 0 evaluates at the end only."""
    tokens: Count = 65536
    """Tokens of validation text that are read."""
    rows: Count = 8
    """Documents read side by side."""
    copy_score: bool = True
    """Pre-training: also measure how well the model copies from its context."""


class Recipe(Section):
    """A training run. ``task`` says which: ``pretrain`` an ``AlibiGPT``, or ``adapt`` a backbone to memory.

    ``method`` says how it is adapted: ``longmem`` trains a SideNet over the frozen backbone, ``memtrm`` the backbone
    itself, which then reads what its older weights wrote (a Memorizing Transformer, the paper's baseline).
    """

    task: Literal["pretrain", "adapt"]
    method: Literal["longmem", "memtrm"] = "longmem"
    run: RunSection = RunSection()
    data: DataSection = DataSection()
    model: ModelSection = ModelSection()
    backbone: BackboneSection = BackboneSection()
    sidenet: SideNetSection = SideNetSection()
    needles: NeedlesSection = NeedlesSection()
    optim: OptimSection = OptimSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    eval: EvalSection = EvalSection()

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file.

        Args:
            path: TOML.
            overrides: ``section.name=value`` each, value in TOML or a bare word.

        Raises:
            ConfigError: the file is missing or no TOML, or settings are wrong; lists every one.
        """
        try:
            settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{path}: cannot read the recipe ({error.strerror}); see recipes/ for some") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML ({error})") from error
        problems = [problem for text in overrides if (problem := _override(settings, text))]
        return cls.parse(settings, problems)

    @classmethod
    def parse(cls, settings: dict[str, Any], problems: Sequence[str] = ()) -> Recipe:
        """Check settings as read from TOML.

        Raises:
            ConfigError: lists every broken rule, and ``problems`` found before.
        """
        found = list(problems)
        try:
            recipe = cls.model_validate(settings)
        except ValidationError as error:
            found += _lines(error)
            try:
                # the rules between settings are read with the wrong ones at their defaults, to report all at once
                recipe = cls.model_validate(_without(settings, [details["loc"] for details in error.errors()]))
            except ValidationError:
                raise ConfigError(found) from error
        named = {line.split(" ")[0] for line in found}
        found += [line for line in recipe.problems() if line.split(" ")[0] not in named]
        if found:
            raise ConfigError(found)
        return recipe

    def problems(self) -> list[str]:
        """Every broken rule between settings, one line each."""
        return _contradictions(self)

    @property
    def out_dir(self) -> Path:
        """The run's folder."""
        return self.run.out_dir or Path("runs") / self.run.name

    @property
    def cache_dir(self) -> Path:
        """Where token ids are kept."""
        return self.data.cache_dir or self.out_dir.parent / "cache"

    def train_source(self) -> TextSource:
        """The training text."""
        return self._source(self.data.paths, self.data.include, self.data.exclude + self.data.held_out)

    def valid_source(self) -> TextSource | None:
        """The validation text; None if there is none."""
        if self.data.valid:
            return self._source(self.data.valid, (), self.data.exclude)
        if self.data.held_out:
            return self._source(self.data.paths, self.data.held_out, self.data.exclude)
        return None

    def _source(self, paths: tuple[str, ...], include: tuple[str, ...], exclude: tuple[str, ...]) -> TextSource:
        data = self.data
        return TextSource(
            paths, data.suffixes, include, exclude, data.field, data.documents, data.undecodable, _WAYS_OUT
        )


_WAYS_OUT = WaysOut(
    missing="check the path, or the recipe's data.paths and data.valid",
    undecodable="convert it, exclude it, or set data.undecodable = 'skip' or 'replace'",
    line="mend the line, or set data.undecodable = 'skip'",
    suffixes="set data.suffixes",
    field="set data.field",
)


def _contradictions(recipe: Recipe) -> list[str]:
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
        if recipe.method == "memtrm":
            found += [
                f"backbone.{name} ({value!r}) is for a frozen backbone, and method = 'memtrm' trains it; leave it away"
                for name, value in (
                    ("quantised", recipe.backbone.quantised),
                    ("device_map", recipe.backbone.device_map),
                )
                if value is not None
            ]
        if optim.parallel == "fsdp":
            found += [
                f"backbone.{name} ({value!r}) and optim.parallel = 'fsdp' both divide the backbone; keep one of them"
                for name, value in (
                    ("quantised", recipe.backbone.quantised),
                    ("device_map", recipe.backbone.device_map),
                )
                if value is not None
            ]
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
    if recipe.task == "pretrain" and optim.segments > 1:
        found.append(f"optim.segments ({optim.segments}) is for task = 'adapt'; windows of pre-training have no order")
    if recipe.task == "adapt" and optim.compile:
        found.append("optim.compile is for task = 'pretrain'; adaptation hooks into its backbone, set it to false")
    if optim.warmup + (optim.decay_fraction if optim.schedule == "wsd" else 0) > 1:
        found.append(f"optim.warmup ({optim.warmup}) and optim.decay_fraction ({optim.decay_fraction}) exceed the run")
    return found


def _needle_problems(recipe: Recipe) -> list[str]:
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


def _override(settings: dict[str, Any], text: str) -> str | None:
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


def _lines(error: ValidationError) -> list[str]:
    """Pydantic's problems in the words of the recipe, one line for each setting."""
    rules: dict[str, list[str]] = {}
    starts: dict[str, str] = {}
    for details in error.errors():
        # what follows section and name is a place inside a list, or which one of several allowed types was tried
        places = [str(place) for place in details["loc"][:2]]
        name = ".".join(places)
        if details["type"] == "extra_forbidden":
            near = _nearest(places)
            starts[name], rule = f"{name} is no setting; ", f"did you mean {near}?" if near else "remove it"
        elif details["type"] == "missing":
            starts[name], rule = f"{name} is missing; ", "set task = 'pretrain' or 'adapt'"
        else:
            starts.setdefault(name, f"{name} ({details['input']!r}) ")
            rule = (
                details["msg"]
                .replace("Input should", "should")
                .replace(" valid integer", "n integer")
                .replace(" valid ", " ")
            )
        rules.setdefault(name, []).append(rule)
    return [starts[name] + ", or ".join(rule for rule in found) for name, found in rules.items()]


def _nearest(places: list[str]) -> str | None:
    """The known setting most like an unknown one: in its own section first, then in any."""
    known = {f"{section}.{name}" for section, names in _known().items() for name in names}
    everything = sorted(known | set(_known()) | {"task", "method"})
    name = ".".join(places)
    section = places[0] if len(places) > 1 else ""
    inside = difflib.get_close_matches(places[-1], _known().get(section, []), n=1, cutoff=0.6)
    if inside:
        return f"{section}.{inside[0]}"
    elsewhere = [setting for setting in everything if setting.split(".")[-1] == places[-1]]
    return next(iter(elsewhere or difflib.get_close_matches(name, everything, n=1, cutoff=0.6)), None)


def _known() -> dict[str, list[str]]:
    sections = {}
    for name, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            sections[name] = list(field.annotation.model_fields)
    return sections


def _without(settings: dict[str, Any], places: list[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy of the settings that lacks the named ones (``task`` falls back to ``pretrain``)."""
    copy: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for place in places:
        section = copy.get(str(place[0]))
        if len(place) > 1 and isinstance(section, dict):
            section.pop(str(place[1]), None)
        else:
            copy.pop(str(place[0]), None)
    copy.setdefault("task", "pretrain")
    return copy
