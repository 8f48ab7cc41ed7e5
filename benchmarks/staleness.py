"""What a memory is still worth when its reader has been trained on: MemTRM reading what its backbone wrote before.

Usage: python -m benchmarks.staleness --memtrm models/small-memtrm --before models/small/backbone --data TEXT...

A Memorizing Transformer trains the layers that write its memory, so what was stored before is of other weights than
those that read it (paper, section 1: memory staleness). LongMem's backbone is frozen: there, both are the same.
Documents are read segment by segment, each scored with the memory of those before it, written by the weights after
training, by those before, or not at all.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import surroundings
from benchmarks.segments import segment_loss, token_ids, whole_segments
from longmem import MemoryBank, MemTRM, TrainingFree
from longmem.data import load_tokenizer
from longmem.evaluation.bootstrap import Bootstrap, relative_difference
from longmem.evaluation.results import write_json

WAYS = ("fresh", "stale", "off")


@torch.inference_mode()
def document_losses(model: MemTRM, before: TrainingFree, ids: Tensor, segment: int) -> list[float]:
    """Summed loss in nats of a document's whole segments, of ids (n,), for each of ``WAYS``."""
    banks = {way: MemoryBank.for_model(model, rows=1) for way in WAYS if way != "off"}
    nats = dict.fromkeys(WAYS, 0.0)
    for part in whole_segments(ids, segment):
        for way in WAYS:
            out = model(part[None], memory=banks.get(way))
            nats[way] += segment_loss(out.logits, part)
            if way == "fresh":
                banks[way].add(out.kv)
            elif way == "stale":
                banks[way].add(before.encode(part[None]))
    return [nats[way] for way in WAYS]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure the three ways on the same documents, print and keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memtrm", required=True)
    parser.add_argument("--before", required=True, help="the backbone that it was trained from")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of every document")
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=Path("results/staleness.json"))
    given = parser.parse_args(arguments)
    model: Any = MemTRM.from_pretrained(given.memtrm)
    before: Any = TrainingFree.from_backbone(given.before, memory_layer=model.memory_layer)
    for each in (model, before):
        each.eval()
    tokenizer = load_tokenizer(given.memtrm)
    texts: dict[str, dict[str, Any]] = {}
    for name in given.data:
        documents = token_ids(tokenizer, [name], given.documents, given.tokens)
        losses: list[list[float]] = []
        counts: list[int] = []
        for number, ids in enumerate(documents, 1):
            whole = len(ids) // given.segment
            if whole:
                losses.append(document_losses(model, before, ids, given.segment))
                counts.append(whole * (given.segment - 1))
            print(f"{name}: {number} of {len(documents)} documents", end="\r", file=sys.stderr)
        nats, tokens = np.array(losses).T, np.array(counts, dtype=float)
        texts[name] = {"documents": len(counts), "tokens": int(tokens.sum())}
        for at, way in enumerate(WAYS):
            texts[name][way] = {"perplexity": float(np.exp(nats[at].sum() / tokens.sum()))}
            if way != "off":
                gap = Bootstrap().relative_difference(nats[at], nats[2], tokens, "documents")
                texts[name][way] |= {
                    "percent_against_off": relative_difference(nats[at], nats[2], tokens),
                    "interval": None if gap is None else [gap.low, gap.high],
                }
        print(f"{name}: {texts[name]}", file=sys.stderr)
    shown = " ".join(sys.argv[1:] if arguments is None else arguments)
    result = {
        "command": f"python -m benchmarks.staleness {shown}",
        "about": "perplexity of MemTRM with memory written by its weights after training (fresh), by those before "
        "(stale), and without (off); % against off, 95 % intervals over documents",
        "surroundings": surroundings(torch.device("cpu")),
        "stale": texts,
    }
    write_json(given.out, result)
    return result


if __name__ == "__main__":
    main()
