"""Tiny random models over one backbone, documents, and what models say by hand, for tests of what is measured."""

from collections.abc import Sequence
from typing import Any

import torch
from tests.family_table import disturbed, tiny_gpt

from longmem import AlibiGPTForCausalLM, LongMem, MemoryBank
from longmem.data.text import Document
from longmem.data.tokens import TokenizedDocument, tokenize_documents, train_tokenizer
from longmem.evaluation.perplexity import PerplexitySettings
from longmem.evaluation.results import Bootstrap

TEXT = "Words of a small text, and more words of it; then the same words again. "
TOKENIZER = train_tokenizer([TEXT], 290)
SETTINGS = PerplexitySettings(block=32, bootstrap=Bootstrap(resamples=50))
HOW: dict[str, Any] = {"window": 16, "rows": 2}
SHAPE: dict[str, Any] = {"chunk_size": 2, "num_retrieved": 8, "memory_size": 64}


def backbone(seed: int = 0) -> AlibiGPTForCausalLM:
    return tiny_gpt(seed, vocab_size=len(TOKENIZER), max_position_embeddings=16, initializer_range=0.3)


def longmem(seed: int = 1, **config: Any) -> LongMem:
    made: LongMem = disturbed(LongMem.from_backbone(backbone(), **SHAPE | config), 0.05, seed).eval()
    return made


def documents(*repeats: int) -> list[TokenizedDocument]:
    texts = [Document(f"test/{'ab'[i % 2]}__{i}.txt", f"{i} " + TEXT * n, "") for i, n in enumerate(repeats)]
    return tokenize_documents(texts, TOKENIZER, group_separator="__")


@torch.no_grad()
def remembered(model: Any, before: Sequence[int], window: int = 16, size: int = 64) -> MemoryBank | None:
    """A bank that has read a text in segments of a window; None where there is no text."""
    bank = MemoryBank.for_model(model, 1, size) if before else None
    for start in range(0, len(before), window):
        bank.add(model.encode(torch.tensor([before[start : start + window]])))  # type: ignore[union-attr]
    if bank is not None:
        bank.end_document()
    return bank


@torch.no_grad()
def by_hand(model: Any, bank: MemoryBank | None, local: Sequence[int], option: Sequence[int]) -> float:
    """Log probability of an option, in one forward pass, alone."""
    reads = {} if bank is None else {"memory": bank}
    logits = model(torch.tensor([[*local, *option[:-1]]]), **reads).logits[0, -len(option) :].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(option)[:, None]).sum())
