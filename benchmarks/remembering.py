"""Facts told in one conversation and asked for in another: how often an answer names the value.

Usage: python -m benchmarks.remembering --model FILE.gguf [--facts 100] [--seed 0] [--server READER] [--out JSON]

Kinds and values of facts are those held out from calibration. Each conversation tells ten facts and is kept as a
document of a store, as `longmem chat` keeps it. In a new conversation each fact is asked for, and answered greedily

    alone      without memory
    window     with the whole first conversation in the window
    recall     with five passages of the store that share words with the question

With ``--server`` a running ``longmem serve`` is told and asked: every fact is told in a request
that is remembered, the server is stopped and started again, and the facts are asked for

    memory     with the memory of the user who told them
    forgotten  the same, after the exchange that told this fact was forgotten

The facts are those of the run without a server, which has what the backbone says alone and with its window.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tests.server.test_process import Process

from benchmarks.measure import made_by
from longmem import LongMem, MemoryStore, TrainingFree
from longmem.chat import chat_prompt, keep
from longmem.data.facts import told_session
from longmem.data.tokens import load_tokenizer
from longmem.evaluation.loading import checkpoint_folder, model_type
from longmem.evaluation.results import write_json
from longmem.progress import Progress
from longmem.store.recall import Recall

Outcome = tuple[dict[str, int], list[dict[str, str]]]
"""How often each way named the value, and every question with its answers."""
WAYS = ("alone", "window", "recall")


def answer(model: Any, tokenizer: Any, ids: list[int]) -> str:
    """Up to 24 likeliest tokens."""
    given = torch.tensor([ids])
    out = model.backbone.model.generate(given, max_new_tokens=24, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


def directly(given: Any) -> Outcome:
    """Ask the model in this process."""
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
    return right, asked


def through_server(given: Any) -> Outcome:
    """Ask a server, as its users would; ten of them at once."""
    draw, users = random.Random(given.seed), list[Any]()
    while (left := given.facts - sum(len(user.facts) for user in users)) > 0:
        users.append(told_session(draw, min(10, left), held_out=True))
    with tempfile.TemporaryDirectory() as root, Progress("asking", 3 * given.facts, "requests") as progress:
        kind: Any = LongMem if model_type(given.server) == "longmem" else TrainingFree
        reader = kind.from_pretrained(given.server, backbone=checkpoint_folder(given.model))
        reader.config.backbone_name_or_path = str(Path(checkpoint_folder(given.model)).absolute())
        reader.save_pretrained(Path(root) / "reader")
        server = Process(Path(root), Path(root) / "reader", 1)
        server.http.timeout = 3600
        server.begin()

        def said(messages: Sequence[dict[str, str]], **settings: Any) -> str:
            body = {"messages": messages, "temperature": 0, "max_tokens": 24, **settings}
            answer = server.call(0, "POST", "/v1/chat/completions", body).raise_for_status().json()
            progress.advance()
            return str(answer["choices"][0]["message"]["content"])

        def tell(number: int) -> None:
            server.call(0, "POST", "/v1/memories", {"id": f"user-{number}"}).raise_for_status()
            told: list[dict[str, str]] = []
            for message in users[number].messages[::2]:
                told.append(dict(message))
                reply = said(told[-3:], memory_id=f"user-{number}", remember=True, recall=0, max_tokens=12)
                told.append({"role": "assistant", "content": reply})

        def ask(number: int) -> list[dict[str, str]]:
            place, found = f"/v1/memories/user-{number}", list[dict[str, str]]()
            documents = [each["name"] for each in server.call(0, "GET", place).json()["data"]]
            for fact, document in zip(users[number].facts, documents, strict=True):
                question = [{"role": "user", "content": fact.asked}]
                found.append({"question": fact.asked, "value": fact.value})
                found[-1]["memory"] = said(question, memory_id=f"user-{number}")
                text = server.call(0, "GET", f"{place}/documents/{document}").json()["text"]
                assert fact.said in text, (fact.said, text)
                server.call(0, "DELETE", f"{place}/documents/{document}").raise_for_status()
                found[-1]["forgotten"] = said(question, memory_id=f"user-{number}")
            return found

        try:
            with ThreadPoolExecutor(10) as pool:
                list(pool.map(tell, range(len(users))))
                server.stop(signal.SIGTERM)
                server.begin()
                asked = [fact for each in pool.map(ask, range(len(users))) for fact in each]
        finally:
            server.close()
    ways = ("memory", "forgotten")
    return {way: sum(each["value"].lower() in each[way].lower() for each in asked) for way in ways}, asked


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--server", metavar="READER", help="folder of a reader, to be asked through a server")
    parser.add_argument("--out", type=Path, help="default: results/smollm2/remembering[-server].json")
    given = parser.parse_args(arguments)
    out = given.out or Path(f"results/smollm2/remembering{'-server' if given.server else ''}.json")
    right, asked = through_server(given) if given.server else directly(given)
    result = made_by("remembering", arguments) | {"facts": len(asked), "right": right, "asked": asked}
    write_json(out, result)
    print(f"of {len(asked)} facts: " + ", ".join(f"{way} {count}" for way, count in right.items()))
    return result


if __name__ == "__main__":
    main()
