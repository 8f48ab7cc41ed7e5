"""How an answer about a conversation is scored: word F1, BLEU-4, and LoCoMo's rules for its five categories."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from longmem.errors import ConfigError
from longmem.evaluation.tasks.dialogue_data import ADVERSARIAL, NOTHING
from longmem.evaluation.tasks.squad_metrics import f1_score

MULTI_HOP, OPEN_DOMAIN = 1, 3
REFUSALS = ("no information available", "not mentioned")


def word_f1(prediction: str, answer: str, category: int | None) -> float:
    """F1 of words in %, with SQuAD's normalisation, references read as LoCoMo reads them.

    A multi-hop answer is a list by commas: the mean over its parts of the best part of the prediction. An open-domain
    answer ends before its first semicolon. LoCoMo's own script also stems words and drops ``and``; this does not.
    """
    if category == MULTI_HOP:
        parts = [part.strip() for part in prediction.split(",")]
        truths = [part.strip() for part in answer.split(",")]
        return 100 * sum(max(f1_score(part, [truth]) for part in parts) for truth in truths) / len(truths)
    return 100 * f1_score(prediction, [reference(answer, category)])


def reference(answer: str, category: int | None) -> str:
    """The answer as it is compared; of an open-domain one what stands before its reason."""
    return answer.split(";")[0].strip() if category == OPEN_DOMAIN else answer


def bleu(prediction: str, answer: str) -> float:
    """Sentence BLEU-4 (0 to 100) as sacrebleu defines it: 13a tokens, exponential smoothing, effective order.

    Raises:
        ConfigError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as problem:
        raise ConfigError("sacrebleu is not installed; pip install 'longmem-lm[eval]'") from problem
    # a short answer has no four words in a row: orders that cannot occur do not count
    return min(100.0, float(BLEU(effective_order=True).sentence_score(prediction, [answer]).score))


def bleu_signature() -> str:
    """How ``bleu`` is computed, in sacrebleu's words; empty where it is not installed."""
    try:
        return f"case:mixed|eff:yes|tok:13a|smooth:exp|version:{metadata.version('sacrebleu')}"
    except metadata.PackageNotFoundError:
        return ""


def choices(answer: str, swapped: bool) -> dict[str, str]:
    """What an adversarial question offers: that nothing is known, and the answer that it lures to."""
    first, second = (answer, NOTHING) if swapped else (NOTHING, answer)
    return {"a": first, "b": second}


def chosen(prediction: str, offered: dict[str, str]) -> str:
    """What the answer to an adversarial question says, by LoCoMo's rule: a letter stands for what it offers."""
    said = prediction.strip().lower()
    if len(said) == 1:
        return offered["a" if said == "a" else "b"]
    if len(said) == 3:
        return offered["a" if said == "(a)" else "b"]
    return said


def refused(said: str) -> bool:
    """Whether an answer says that nothing is known, by LoCoMo's rule."""
    return any(words in said.lower() for words in REFUSALS)


def measure(prediction: str, answer: str, category: int | None, offered: dict[str, str] | None) -> dict[str, Any]:
    """``f1`` and ``bleu`` of an answer; of an adversarial question ``f1`` is 100 if it was refused, else 0."""
    if category == ADVERSARIAL and offered is not None:
        said = chosen(prediction, offered)
        return {"f1": 100.0 * refused(said), "bleu": bleu(said, NOTHING)}
    return {"f1": word_f1(prediction, answer, category), "bleu": bleu(prediction, reference(answer, category))}
