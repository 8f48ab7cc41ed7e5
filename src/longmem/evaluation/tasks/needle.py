"""``longmem eval needle``: facts hidden at chosen depths in real text, and asked for at its end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from longmem.data.facts import KINDS, OPTIONS
from longmem.errors import ConfigError
from longmem.evaluation.asking import Asker, Choice, Scored
from longmem.evaluation.task import Metric, digest_of
from longmem.evaluation.tasks.needle_text import Haystack, Trial, make_trials
from longmem.files import whole
from longmem.memory.encoded import EncodedText

log = logging.getLogger(__name__)

EXACT, CHOICE = "exact", "choice"
TOGETHER = 32  # trials whose texts a system without memory is given at one time


@dataclass
class Needle:
    """See ``Task``.

    A system with memory reads the whole text into it, in segments of the window, and has only the question in its
    window. A system without has the end of the text in front of the question, as far as its window goes.

    Attributes:
        haystack: the text; its segments are as long as the window.
        tokenizer: of all systems.
        kinds: of facts, see ``longmem.data.facts.KINDS``.
        lengths: tokens of text, each a multiple of the window.
        depths: where the fact is hidden, in % of the text.
        trials: for each kind, length and depth.
        seed: of facts, places and texts.
        encoding: told how many of how many segments of the text a system has read.
        cache: folder that keeps what the text leaves in memory, for other runs over the same backbone; None: none.

    Raises:
        ConfigError: lists every setting that breaks a rule.
    """

    haystack: Haystack
    tokenizer: Any
    kinds: Sequence[str]
    lengths: Sequence[int]
    depths: Sequence[float]
    trials: int
    seed: int = 0
    encoding: Callable[[int, int], Any] = lambda done, total: None
    cache: Path | None = None
    name: str = field(default="needle", init=False)
    metrics: tuple[Metric, ...] = field(
        default=(
            Metric(EXACT, "exact answer", "%", chance=0.0),
            Metric(CHOICE, f"true answer likeliest of {OPTIONS}", "%", chance=100 / OPTIONS),
        ),
        init=False,
    )
    _encoded: EncodedText | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        window = self.haystack.window
        problems = [f"kind ({kind!r}) must be one of {', '.join(KINDS)}" for kind in self.kinds if kind not in KINDS]
        problems += [f"depth ({depth:g}) must be from 0 to 100 %" for depth in self.depths if not 0 <= depth <= 100]
        problems += [
            f"length ({length}) must be a multiple of the window ({window}); try {max(1, length // window) * window}"
            for length in self.lengths
            if length % window or length < window
        ]
        problems += [
            f"{name} ({', '.join(map(str, chosen)) or 'none'}) must be one or more, all different"
            for name, chosen in (("kinds", self.kinds), ("lengths", self.lengths), ("depths", self.depths))
            if not chosen or len(set(chosen)) < len(chosen)
        ]
        problems += [f"trials ({self.trials}) must be at least 1"] if self.trials < 1 else []
        if problems:
            raise ConfigError(problems)

    def settings(self) -> dict[str, Any]:
        return {
            "text": list(self.haystack.source),
            "text_digest": self.haystack.digest,
            "kinds": list(self.kinds),
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "trials": self.trials,
            "seed": self.seed,
        }

    def examples(self) -> list[Trial]:
        return make_trials(
            self.haystack,
            self.tokenizer,
            kinds=self.kinds,
            lengths=self.lengths,
            depths=self.depths,
            trials=self.trials,
            seed=self.seed,
        )

    def answer(self, asker: Asker, examples: Sequence[Trial]) -> Iterator[tuple[int, dict[str, float]]]:
        if asker.reads_memory:
            yield from self._from_memory(asker, examples)
            return
        for start in range(0, len(examples), TOGETHER):
            some = examples[start : start + TOGETHER]
            questions = [
                Choice((*trial.text(self.haystack, asker.window), *trial.question), trial.options) for trial in some
            ]
            for number, scored in asker.score(questions):
                yield start + number, values(scored)

    def _from_memory(self, asker: Asker, examples: Sequence[Trial]) -> Iterator[tuple[int, dict[str, float]]]:
        if not examples:
            return
        assert asker.memory_size is not None
        text = self._read(asker.model)
        for number, trial in enumerate(examples):
            count = trial.length // self.haystack.window
            changed = trial.changed(self.haystack)
            with text.holding(trial.first, count, changed, asker.memory_size) as memory:
                for _, scored in asker.score([Choice(trial.question, trial.options)], memory):
                    yield number, values(scored)

    def _read(self, model: Any) -> EncodedText:
        """The text as this model encodes it; kept until another model asks."""
        if self._encoded is None or self._encoded.model is not model:
            self._encoded = None  # not two of them at a time
            ids = torch.from_numpy(self.haystack.ids)
            file = None if self.cache is None else self.cache / f"{self._key(model)}.safetensors"
            kept = _kept(file)
            self._encoded = EncodedText(model, ids, lambda done: self.encoding(done, len(ids)), kept)
            if file is not None and kept is None:
                state = {name: tensor.contiguous() for name, tensor in self._encoded.state_dict().items()}
                with whole(file) as part:
                    save_file(state, part)
        return self._encoded

    def _key(self, model: Any) -> str:
        """Of all that decides what the text leaves in memory."""
        shape = (self.haystack.window, model.config.chunk_size, model.memory_layer, str(model.dtype))
        return f"text-{digest_of(self.haystack.digest, model.fingerprint, *shape)}"


def _kept(file: Path | None) -> dict[str, torch.Tensor] | None:
    if file is None or not file.exists():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        log.warning("%s: damaged (%s); the text is read again", file, error)
        return None


def values(scored: Scored) -> dict[str, float]:
    """Metrics of one answer in %; the true option is the first.

    ``exact``: every token of the true answer is the model's first choice, which is what greedy decoding writes.
    """
    best = max(range(len(scored.logprobs)), key=lambda option: scored.logprobs[option])
    return {EXACT: 100.0 * scored.greedy[0], CHOICE: 100.0 * (best == 0)}
