"""Recipes: a training run as a TOML file, read into typed sections.

``longmem train RECIPE.toml --set section.name=value``. Every problem of a recipe is reported, in one error.
"""

from __future__ import annotations

import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from longmem.config import Fusion, Init, LongMemConfig, MemTRMConfig, Trained
from longmem.data.text import TEXT_SUFFIXES, TextSource
from longmem.errors import ConfigError
from longmem.training.recipe_problems import broken_rules, lines, override, without

Share = typing.Annotated[float, Field(ge=0, le=1)]
Count = typing.Annotated[int, Field(ge=1)]
CountOrZero = typing.Annotated[int, Field(ge=0)]
Positive = typing.Annotated[float, Field(gt=0)]
BelowOne = typing.Annotated[float, Field(ge=0, lt=1)]
Layers = typing.Annotated[
    tuple[CountOrZero, ...] | Literal["auto"] | None,
    BeforeValidator(lambda layers: [layers] if isinstance(layers, int) else layers),
    Field(validation_alias=AliasChoices("memory_layers", "memory_layer")),
]

PACKAGE = Path(__file__).parents[1]


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
    undecodable: Literal["error", "skip", "replace"] = "error"
    """What happens to a file that is not UTF-8."""
    tokenizer: str | None = None
    """Folder or hub id. None: pre-training learns one of ``vocab_size``, adaptation takes the backbone's."""
    vocab_size: Count = 8192
    """Of the tokenizer that pre-training learns."""
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

    memory_layers: Layers = None
    """Backbone layers that are remembered, 0-based; None: the one at three quarters of the depth; auto: up to four
    whose memory is worth most on the recipe's text, as ``longmem layers`` measures. ``memory_layer = 3`` means
    ``memory_layers = [3]``."""
    start: str | None = None
    """SideNet checkpoint to go on from, over the same backbone; memory_layers, stride, fusion and gate are its own."""
    stride: Count = 2
    """Backbone layers for each SideNet layer; MemTRM has none, as it has no init and no final_state."""
    init: Init = "copy"
    """copy: of the backbone's layers (paper); zero: the same, starting at exactly the backbone's perplexity; delta:
    layers from the first memory layer up, each adding its difference from its source, starting there too."""
    trained: Trained = "all"
    """attention: copied layers use the backbone's own feed-forward, which is neither trained nor saved."""
    fusion: Fusion = "gate"
    """gate: one share per head (paper); softmax: every token chooses its own; token: by a trained ``TokenGate``."""
    gate: typing.Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of its output that a head takes from memory when training begins; the paper's is half."""
    final_state: Literal["pre_norm", "normed"] | None = None
    """None: as the backbone's family does it."""
    recency: typing.Annotated[float, Field(ge=0)] | None = None
    """What a chunk's scores lose to a newer one that matches as well: of two such facts the newer is read.
    None: 0 (paper), or that of ``start``."""
    memory_temperature: typing.Annotated[float, Field(gt=0)] | None = None
    """What the scores of retrieved tokens are divided by among themselves; below 1 the best matches get more.
    None: 1 (paper), or that of ``start``."""
    chunk_size: Count = 4
    """S, tokens per chunk."""
    num_retrieved: Count = 64
    """K, tokens that each token and head reads; a multiple of S."""
    memory_size: Count = 65536
    """M, tokens that each row keeps; a multiple of S."""
    memory: bool = True
    """False: the control, the same SideNet, or backbone, trained without any memory."""
    boundary: Literal["keep", "reset"] = "keep"
    """What a row's memory does when its next text begins."""
    memory_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of stored keys and values; None: bfloat16 where a GPU computes in it, else float32."""


class OptimSection(Section):
    """Optimiser, schedule, budget, precision."""

    optimiser: Literal["adamw", "muon"] = "adamw"
    """muon: ``torch.optim.Muon`` for the 2-D weights inside the layers, AdamW for the rest. It multiplies in bfloat16,
    which CPUs without such instructions emulate slowly."""
    lr: Positive = 2e-4
    """Peak learning rate of what AdamW trains."""
    muon_lr: Positive = 0.02
    """Learning rate of the weights that Muon trains."""
    gate_lr: Positive | None = None
    """Learning rate of the memory gates; None: ``lr``."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.98)
    """Of AdamW."""
    eps: Positive = 1e-6
    """Of AdamW."""
    weight_decay: typing.Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; norms, biases and gates do not decay."""
    schedule: Literal["polynomial", "cosine", "wsd", "constant"] = "polynomial"
    """polynomial: linear to zero (paper); wsd: flat until its decay. All but constant end at zero."""
    decay_fraction: Share = 0.3
    """wsd: share of the run, at its end, over which the rate falls linearly to zero."""
    warmup: Share = 0.02
    """Share of the run over which the rate rises linearly from zero."""
    steps: Count | None = None
    """The budget in optimiser steps; or give tokens, or max_minutes."""
    tokens: Count | None = None
    """The budget in tokens of all rows and processes."""
    max_minutes: Positive | None = None
    """Stop cleanly after so long, over all resumed parts of the run. Without steps and tokens it is the budget, and the
    schedule follows the clock."""
    rows: Count = 8
    """Rows per process and forward pass."""
    accumulate: Count = 1
    """Forward passes per optimiser step; adaptation: of consecutive segments, memory is written after each."""
    clip: typing.Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    dropout: BelowOne = 0.1
    """Of the layers that are trained."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 where the hardware multiplies in it, else fp32. Many CPUs emulate bf16, many times slower."""
    gradient_checkpointing: bool = False
    """Recompute the layers of a SideNet in backward: less memory, more time."""
    compile: bool = False
    """torch.compile the pre-trained model; needs a C++ compiler on a CPU."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Several processes: ddp, the whole model in each; fsdp, weights and optimiser divided among them (FSDP2)."""


class NeedlesSection(Section):
    """Adaptation to facts hidden in memory, see ``NeedleStream``. Not in the paper."""

    kinds: tuple[Literal["passkey", "pair", "multi", "twohop"], ...] = ()
    """Of facts that are asked for, see ``draw_facts``: passkey, pair, multi, twohop. Empty: text is read, as ever."""
    rows: Count = 32
    """Questions of a step."""
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
    best: bool = False
    """Finish with the weights of the lowest validation loss, not with the last ones."""
    patience: CountOrZero = 0
    """End the run after so many evaluations without a new lowest loss; 0 never does."""


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
            path: TOML; or the name of a recipe that comes with the package, ``tiny-cpu``.
            overrides: ``section.name=value`` each, value in TOML or a bare word.

        Raises:
            ConfigError: the file is missing or no TOML, or settings are wrong; lists every one.
        """
        folders = (PACKAGE / "recipes", PACKAGE.parents[1] / "recipes")  # of the wheel, of the repository
        shipped = {file.stem: file for folder in folders for file in sorted(folder.glob("*.toml"))}
        file = Path(path) if Path(path).exists() else shipped.get(Path(path).name, Path(path))
        try:
            settings = tomllib.loads(file.read_text(encoding="utf-8").replace("{longmem}", PACKAGE.as_posix()))
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot read the recipe ({error.strerror}); name a file, or one of {', '.join(shipped)}"
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML ({error})") from error
        problems = [problem for text in overrides if (problem := override(settings, text))]
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
            found += lines(error, cls)
            try:
                # the rules between settings are read with the wrong ones at their defaults, to report all at once
                recipe = cls.model_validate(without(settings, error))
            except ValidationError:
                raise ConfigError(found) from error
        named = {line.split(" ")[0] for line in found}
        found += [line for line in broken_rules(recipe) if line.split(" ")[0] not in named]
        if found:
            raise ConfigError(found)
        return recipe

    @property
    def out_dir(self) -> Path:
        """The run's folder."""
        return self.run.out_dir or Path("runs") / self.run.name

    @property
    def cache_dir(self) -> Path:
        """Where token ids are kept."""
        return self.data.cache_dir or self.out_dir.parent / "cache"

    @property
    def config_class(self) -> type[LongMemConfig | MemTRMConfig]:
        """Of the model that is adapted."""
        return LongMemConfig if self.method == "longmem" else MemTRMConfig

    @property
    def model_settings(self) -> dict[str, Any]:
        """Settings of the model's config that [sidenet] gives."""
        given, known = self.sidenet.model_dump(exclude_none=True), self.config_class.__dataclass_fields__
        return {name: value for name, value in given.items() if name in known}

    def train_source(self) -> TextSource:
        """The training text."""
        return self._source(self.data.paths, self.data.include, self.data.exclude + self.data.held_out)

    def valid_source(self) -> TextSource | None:
        """The validation text; None if there is none."""
        paths, include = (self.data.valid, ()) if self.data.valid else (self.data.paths, self.data.held_out)
        return self._source(paths, include, self.data.exclude) if self.data.valid or include else None

    def _source(self, paths: tuple[str, ...], include: tuple[str, ...], exclude: tuple[str, ...]) -> TextSource:
        data, way_out = self.data, "set data.{} = {}"  # the name of a setting, and its value
        return TextSource(
            paths, data.suffixes, include, exclude, field=data.field, undecodable=data.undecodable, option=way_out
        )
