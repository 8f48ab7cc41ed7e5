"""Facts told in one conversation and asked for in another: how often an answer names the value.

Usage: python -m benchmarks.remembering --model FILE.gguf [--facts 100] [--seed 0] [--out JSON]

Kinds and values of facts are those held out from calibration. Each conversation tells ten facts and is kept as a
document of a store, as `longmem chat` keeps it. In a new conversation each fact is asked for, and answered greedily

    alone      without memory
    window     with the whole first conversation in the window
    recall     with five passages of the store that share words with the question
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import surroundings
from longmem import MemoryStore, TrainingFree
from longmem.chat import chat_prompt, keep
from longmem.data.tokenizer import load_tokenizer
from longmem.data.told import told_session
from longmem.evaluation.loading import checkpoint_folder
from longmem.evaluation.results import write_json
from longmem.progress import Progress
from longmem.store.recall import Recall

WAYS = ("alone", "window", "recall")


def answer(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """Up to 24 likeliest tokens."""
    given = torch.tensor([ids])
    out = model.backbone.model.generate(given, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/smollm2/remembering.json"))
    given = parser.parse_args(arguments)
    folder = checkpoint_folder(given.model)
    model, tokenizer = TrainingFree.from_backbone(folder, gate=0.0).eval(), load_tokenizer(folder)
    draw, asked = random.Random(given.seed), []
    right = dict.fromkeys(WAYS, 0)
    with (
        tempfile.TemporaryDirectory() as root,
        Progress("asking", given.facts, "facts") as progress,
        MemoryStore.open(Path(root) / "store", model=model, tokenizer=tokenizer) as store,
    ):
        while len(asked) < given.facts:
            session = told_session(draw, min(10, given.facts - len(asked)), held_out=True)
            namespace = f"user-{len(asked)}"
            told = [dict(message) for message in session.messages]
            keep(store, namespace, "first", told)
            recall = Recall(store, namespace)
            for fact in session.facts:
                question = [{"role": "user", "content": fact.asked}]
                prompts = {
                    "alone": chat_prompt(tokenizer, question),
                    "window": chat_prompt(tokenizer, [*told, *question]),
                    "recall": chat_prompt(tokenizer, question, recall=recall),
                }
                answers = {way: answer(model, tokenizer, prompt.ids) for way, prompt in prompts.items()}
                for way, text in answers.items():
                    right[way] += fact.value.lower() in text.lower()
                asked.append({"question": fact.asked, "value": fact.value, **answers})
                progress.advance(note=", ".join(f"{way} {count}" for way, count in right.items()))
    result = {
        "command": " ".join(["python -m benchmarks.remembering", *(sys.argv[1:] if arguments is None else arguments)]),
        "surroundings": surroundings(torch.device("cpu")),
        "facts": len(asked),
        "right": right,
        "asked": asked,
    }
    write_json(given.out, result)
    print(f"of {len(asked)} facts: " + ", ".join(f"{way} {count}" for way, count in right.items()))
    return result


if __name__ == "__main__":
    main()
