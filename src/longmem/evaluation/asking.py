"""Ask a system questions whose contexts may be longer than its window: likelihoods of options, and continuations.

What does not fit the window is read into memory where there is one, and lost where there is none, as it would be for a
user of that system. B sequences side by side · T window tokens · V vocabulary
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.evaluation.requests import padded
from longmem.evaluation.systems import BACKBONE, Comparison, System
from longmem.memory import MemoryBank
from longmem.types import AttentionKV, Memory

FULL = "full"
LINEAR_POSITIONS = ("alibi_gpt", "bloom", "mpt")  # ALiBi has no last position

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Choice:
    """Options whose likelihoods are compared.

    Attributes:
        context: what lies before each of them; its end is in the window, as much as fits beside the longest option.
        options: each at least one token.
        memory: text before the context that only memory can hold (demonstrations, sessions, earlier chapters). A
            full-context system has it in front of the context, others never see it.
    """

    context: Sequence[int]
    options: Sequence[Sequence[int]]
    memory: Tokens = ()


@dataclass(frozen=True)
class Scored:
    """The answer to a ``Choice``.

    Attributes:
        logprobs: of every option in nats, summed over its tokens.
        greedy: whether every token of the option is the model's first choice.
        next_token: the model's first choice right after the context.
    """

    logprobs: tuple[float, ...]
    greedy: tuple[bool, ...]
    next_token: int


@dataclass(frozen=True)
class Prompt:
    """Text to be continued greedily; ``context`` and ``memory`` as in ``Choice``."""

    context: Sequence[int]
    max_new_tokens: int
    memory: Tokens = ()


@dataclass(frozen=True)
class Asker:
    """One system, ready to be asked.

    Attributes:
        name: key of the system in results.
        label: its name for people.
        identity: what its answers depend on.
        model: a ``LongMem``, another model with memory, or any causal language model.
        tokenizer: of all systems.
        window: T; also the segments in which text is read into memory.
        rows: B.
        memory_size: tokens that it remembers; None is no memory.
        whole: ``memory`` of a question is put in front of its context, as far as the window goes.
        device: where the model is.
    """

    name: str
    label: str
    identity: dict[str, Any]
    model: Any
    tokenizer: Any
    window: int
    rows: int = 8
    memory_size: int | None = None
    whole: bool = False
    device: torch.device | str = "cpu"

    @property
    def reads_memory(self) -> bool:
        return self.memory_size is not None

    def score(self, questions: Sequence[Choice], bank: Memory | None = None) -> Iterator[tuple[int, Scored]]:
        """Log-probabilities of options.

        Args:
            questions: those with equal ``memory`` share one reading of it.
            bank: a memory of one row, made before, that every question reads instead of what its ``memory`` says.

        Yields:
            (number of the question, answer), in the order in which they are done.

        Raises:
            ConfigError: an option is empty or longer than the window.
        """
        laid_out = [
            self._laid_out(n, q.context, q.memory, _longest(n, q, self.window)) for n, q in enumerate(questions)
        ]
        for pack, memory in self._packs(laid_out, lambda text: len(questions[text.number].options), bank):
            sequences = [
                (text, sequence) for text in pack for sequence in _sequences(text, questions[text.number].options)
            ]
            sequences.sort(key=lambda pair: -len(pair[1].inputs))
            found: dict[int, dict[int, _OptionScore]] = {}
            for at in range(0, len(sequences), self.rows):
                batch = sequences[at : at + self.rows]
                for (text, _), scores in zip(batch, self._forward(batch, questions, memory), strict=True):
                    mine = found.setdefault(text.number, {})
                    mine.update(scores)
                    if len(mine) == len(questions[text.number].options):
                        yield text.number, _collected(mine)

    def generate(self, prompts: Sequence[Prompt], bank: Memory | None = None) -> Iterator[tuple[int, list[int]]]:
        """Greedy continuations, cut after the end of text.

        Args:
            prompts: those with equal ``memory`` share one reading of it.
            bank: as in ``score``.

        Yields:
            (number of the prompt, new token ids), in the order in which they are done.

        Raises:
            ConfigError: no room in the window is left for a context.
        """
        laid_out = []
        for number, prompt in enumerate(prompts):
            if not 1 <= prompt.max_new_tokens < self.window:
                raise ConfigError(
                    f"max_new_tokens ({prompt.max_new_tokens}) must be at least 1 and below the window ({self.window})"
                )
            laid_out.append(self._laid_out(number, prompt.context, prompt.memory, prompt.max_new_tokens))
        for pack, memory in self._packs(laid_out, lambda text: 1, bank):
            ordered = sorted(pack, key=lambda text: -len(text.local))
            for at in range(0, len(ordered), self.rows):
                batch = ordered[at : at + self.rows]
                new = [prompts[text.number].max_new_tokens for text in batch]
                for text, most, ids in zip(batch, new, self._continue(batch, max(new), memory), strict=True):
                    yield text.number, ids[:most]

    def remember(self, memory: Tokens) -> MemoryBank:
        """A memory of one row that has read a text, for many calls of ``score`` and ``generate``.

        Raises:
            ConfigError: the system has no memory, or it holds nothing after reading.
        """
        read = self._read([memory]) if self.reads_memory else None
        if read is None or not isinstance(read.bank, MemoryBank) or int(read.bank.tokens.min()) == 0:
            raise ConfigError(
                f"{self.name}: its memory holds nothing after reading {len(memory):,} tokens, so that a result with "
                "memory would be one without; give it text to read and a larger --memory-sizes"
            )
        return read.bank

    # laying out

    def _laid_out(self, number: int, context: Sequence[int], memory: Tokens, room: int) -> _Text:
        """Cut a text where the window begins, leaving ``room`` tokens of it for what follows the context."""
        text = (*memory, *context) if self.whole else tuple(context)
        cut = max(0, len(text) - (self.window - room))
        before: Tokens = (*memory, *text[:cut]) if self.reads_memory else ()
        return _Text(number, before, text[cut:])

    def _packs(
        self, texts: Sequence[_Text], weight: Any, bank: Memory | None
    ) -> Iterator[tuple[list[_Text], _Memory | None]]:
        """Texts with the memory that they read: enough of them that a batch is full, side by side in one bank."""
        if bank is not None or not self.reads_memory:
            if texts:
                yield list(texts), None if bank is None else _Memory(bank, {text.before: 0 for text in texts})
            return
        groups: dict[Tokens, list[_Text]] = {}
        for text in texts:
            groups.setdefault(text.before, []).append(text)
        # nothing to remember first; then by length, so that rows are read side by side
        waiting = sorted(groups, key=lambda before: len(before))
        while waiting:
            chosen: list[Tokens] = []
            load = 0
            while waiting and len(chosen) < self.rows and load < self.rows:
                chosen.append(waiting.pop(0))
                load += sum(weight(text) for text in groups[chosen[-1]])
            yield [text for before in chosen for text in groups[before]], self._read(chosen)

    @torch.no_grad()
    def _read(self, texts: Sequence[Tokens]) -> _Memory | None:
        """A bank with a row for every text."""
        longest = max(map(len, texts))
        if longest == 0 or self.memory_size is None:
            return None
        chunk = self.model.config.chunk_size
        # a bank larger than the longest text is never filled: do not reserve it
        capacity = min(self.memory_size, -(-longest // chunk) * chunk)
        bank = MemoryBank.for_model(self.model, len(texts), capacity)
        starts = [self._first_kept(len(text)) for text in texts]
        for step in range(0, longest, self.window):
            parts = [
                (row, text[start + step : start + step + self.window])
                for row, (text, start) in enumerate(zip(texts, starts, strict=True))
                if len(text) > start + step
            ]
            if not parts:
                break
            ids, real = padded([part for _, part in parts], self.device)
            kv = self.model.encode(ids, real.long())
            bank.add(AttentionKV(kv.keys, kv.values, real), rows=torch.tensor([row for row, _ in parts]))
        bank.end_document(torch.arange(len(texts)))
        return _Memory(bank, {text: row for row, text in enumerate(texts)})

    def _first_kept(self, length: int) -> int:
        """Segments that memory would have forgotten by the end are not read: they do not change what is in it."""
        assert self.memory_size is not None
        if self.window % self.model.config.chunk_size:
            return 0
        return max(0, (length - self.memory_size) // self.window * self.window)

    # running

    @torch.no_grad()
    def _forward(
        self, batch: Sequence[tuple[_Text, _Sequence]], questions: Sequence[Choice], memory: _Memory | None
    ) -> Iterator[dict[int, _OptionScore]]:
        ids, _ = padded([sequence.inputs for _, sequence in batch], self.device)
        first = min(sequence.first for _, sequence in batch)
        logits = self._logits(ids, ids.shape[1] - first, self._reads(memory, [text for text, _ in batch]))
        for (text, sequence), row in zip(batch, logits, strict=True):
            scored = row[sequence.first - first : len(sequence.inputs) - first].float().log_softmax(-1)
            best = scored.argmax(-1)
            yield {
                option: _option_score(scored, best, questions[text.number].options[option])
                for option in sequence.options
            }

    def _logits(self, ids: Tensor, keep: int, reads: dict[str, Any]) -> Tensor:
        """(B, keep, V); a model that does not know ``logits_to_keep`` gives all."""
        known = "logits_to_keep" in inspect.signature(type(self.model).forward).parameters
        some = {"logits_to_keep": keep} if known else {}
        logits: Tensor = self.model(input_ids=ids, use_cache=False, **some, **reads).logits
        return logits[:, -keep:]

    @torch.no_grad()
    def _continue(self, batch: Sequence[_Text], new: int, memory: _Memory | None) -> Iterator[list[int]]:
        width = max(len(text.local) for text in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        for row, text in enumerate(batch):
            ids[row, width - len(text.local) :] = torch.tensor(text.local)
            mask[row, width - len(text.local) :] = 1
        end = self.tokenizer.eos_token_id
        generated = self.model.generate(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            eos_token_id=end,
            pad_token_id=end if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id,
            **self._reads(memory, batch),
        )
        for row in generated[:, width:].tolist():
            yield row[: row.index(end) + 1] if end in row else row

    @staticmethod
    def _reads(memory: _Memory | None, texts: Iterable[_Text]) -> dict[str, Any]:
        if memory is None:
            return {}
        return {"memory": memory.bank, "memory_rows": torch.tensor([memory.row_of[text.before] for text in texts])}


def askers(
    comparison: Comparison,
    tokenizer: Any,
    *,
    window: int,
    rows: int = 8,
    full_context: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Asker]:
    """Every system of a comparison, and the backbone with a window so long that it needs no memory.

    Args:
        comparison: see ``load_comparison``.
        tokenizer: of all systems.
        window: tokens that each sees at once.
        rows: sequences side by side.
        full_context: window of the full-context backbone; None leaves it out.
        device: where the models are.

    Raises:
        ConfigError: the backbone has no positions for so long a window, or it is no longer than ``window``.
    """
    found = [_asker(system, comparison, tokenizer, window, rows, device) for system in comparison.systems]
    if full_context is not None:
        config = comparison.model.config
        positions = getattr(config.get_text_config(), "max_position_embeddings", None)
        ends = positions is not None and getattr(config, "model_type", "") not in LINEAR_POSITIONS
        if full_context <= window or (positions is not None and ends and full_context > positions):
            raise ConfigError(
                f"full context ({full_context}) must be above the window ({window})"
                + (f" and at most the backbone's positions ({positions})" if ends else "")
                + "; change --full-context or leave it away"
            )
        backbone = next(asker for asker in found if asker.name == BACKBONE)
        label = f"backbone, full context of {full_context:,}"
        identity = backbone.identity | {"window": full_context}
        fewer = max(1, rows * window // full_context)  # as many tokens in a batch as the others have
        found.append(
            Asker(
                f"{FULL}_{full_context}",
                label,
                identity,
                backbone.model,
                tokenizer,
                full_context,
                fewer,
                None,
                True,
                device,
            )
        )
    return found


def _asker(system: System, comparison: Comparison, tokenizer: Any, window: int, rows: int, device: Any) -> Asker:
    model: Any = comparison.model if system.reader is None else system.reader
    size = system.memory_size
    return Asker(system.name, system.label, system.identity, model, tokenizer, window, rows, size, False, device)


@dataclass(frozen=True)
class _Text:
    """What a question lays before the model: ``before`` is read into memory, ``local`` lies in the window."""

    number: int
    before: Tokens
    local: Tokens


@dataclass(frozen=True)
class _Memory:
    bank: Memory
    row_of: dict[Tokens, int]


@dataclass(frozen=True)
class _Sequence:
    """Tokens that go through the model once, and the options whose inputs they begin with."""

    inputs: Tokens
    first: int  # position whose logits score the first token of every option
    options: tuple[int, ...]


@dataclass(frozen=True)
class _OptionScore:
    logprob: float
    greedy: bool
    next_token: int


def _longest(number: int, question: Choice, window: int) -> int:
    """Tokens of the window that the context must leave free: the last token of an option is no input."""
    longest = max((len(option) for option in question.options), default=0)
    if not question.options or min(map(len, question.options)) == 0 or longest > window:
        raise ConfigError(
            f"question {number}: every option must have 1 to {window} tokens (the window), not {longest}; "
            "cut or drop it"
        )
    return longest - 1


def _sequences(text: _Text, options: Sequence[Sequence[int]]) -> Iterator[_Sequence]:
    """A causal model answers all options whose inputs are beginnings of one another in one pass."""
    if not text.local:
        raise ConfigError(f"question {text.number} has no context; give it at least one token, such as a line end")
    kept: list[tuple[Tokens, list[int]]] = []
    for number in sorted(range(len(options)), key=lambda n: -len(options[n])):
        inputs = tuple(options[number][:-1])
        for longer, members in kept:
            if longer[: len(inputs)] == inputs:
                members.append(number)
                break
        else:
            kept.append((inputs, [number]))
    for inputs, members in kept:
        yield _Sequence((*text.local, *inputs), len(text.local) - 1, tuple(members))


def _option_score(scored: Tensor, best: Tensor, option: Sequence[int]) -> _OptionScore:
    targets = torch.tensor(option, device=scored.device)
    chosen = scored[: len(option)].gather(1, targets[:, None]).double().sum().item()
    return _OptionScore(chosen, bool((best[: len(option)] == targets).all()), int(best[0]))


def _collected(scores: dict[int, _OptionScore]) -> Scored:
    ordered = [scores[number] for number in sorted(scores)]
    return Scored(
        tuple(score.logprob for score in ordered), tuple(score.greedy for score in ordered), ordered[0].next_token
    )
