"""Small systems and data sets of all tasks, the same on every machine: what the golden numbers were made with."""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMem, MemTRM

WINDOW = 128
MEMORY: dict[str, Any] = {"chunk_size": 4, "num_retrieved": 16, "memory_size": 512}
SYSTEMS = ["--control", "control", "--memtrm", "memtrm", "--training-free", "0.3", "--memory-sizes", "256"]

ASKED = {
    "chapterbreak": ["--data", "chapters_ctx_300.json", "--prefix", "20,100,300", "--suffix-tokens", "16"],
    "icl": ["--data", "icl", "--datasets", "mr,subj", "--local-shots", "1,3", "--memory-shots", "0,10", "--seeds", "2",
            "--limit", "6", "--full-context", "384"],
    "squad": ["--train", "train.json", "--data", "dev.json", "--local-shots", "1", "--memory-shots", "0,4", "--seeds",
              "2", "--limit", "12", "--max-answer-tokens", "6"],
    "needle": ["--data", "text.txt", "--kinds", "passkey,multi", "--lengths", "1k,2k", "--depths", "3", "--trials",
               "2"],
    "dialogue": ["--data", "locomo.json", "--data", "msc.txt", "--new-tokens", "6", "--full-context", "384"],
    "facts": ["--data", "text.txt", "--between", "64,512", "--sessions", "2", "--facts", "5", "--recall", "2",
              "--new-tokens", "8"],
    "babi": ["--data", "babi", "--text", "text.txt", "--tasks", "1,2", "--lengths", "512,1k", "--trials", "2",
             "--recall", "1"],
}  # fmt: skip
"""Arguments of ``longmem eval TASK`` beside the systems; some tens of examples of each."""


def disturb(model: torch.nn.Module, seed: str, spread: float, names: Callable[[str], bool] = lambda name: True) -> None:
    """Add noise to every matrix; by its name, so that the order in which parameters are made does not matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and names(name):
                draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=spread)


def make_home(home: Path, tokenizer: Any, made_text: Callable[..., str]) -> Path:
    """Checkpoints ``side``, ``control`` and ``memtrm`` over one backbone, and a file for every task."""
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.fill_(float(parameter.ndim == 1))
            assert name
    disturb(backbone, "backbone", 0.25)
    with torch.no_grad():  # so that some of what is generated is what is expected
        backbone.lm_head.weight[tokenizer(" xynp")["input_ids"]] *= 4
    backbone.save_pretrained(home / "backbone")
    tokenizer.save_pretrained(home / "backbone")
    for name in ("side", "control"):
        side = LongMem.from_backbone(home / "backbone", memory_layer=2, **MEMORY)
        trained = set(side.trainable_parameter_names())
        disturb(side, name, 0.05, trained.__contains__)
        side.save_pretrained(home / name)
    trm: Any = MemTRM.from_backbone(home / "backbone", memory_layer=2, **MEMORY)
    disturb(trm, "memtrm", 0.02)
    trm.save_pretrained(home / "memtrm")
    (home / "text.txt").write_text(made_text(800))
    _chapters(home, made_text)
    _short_texts(home)
    make_questions(home, made_text)
    _talks(home)
    _stories(home)
    return home


def _chapters(home: Path, made_text: Callable[..., str]) -> None:
    def item(seed: int) -> dict[str, Any]:
        begins = [made_text(8, 100 * seed + n).strip() for n in range(6)]
        return {"ctx": made_text(70, seed), "pos": begins[0], "negs": begins[1:]}

    splits = {split: {f"{split}{w}": [item(10 * s + 4 * w + n) for n in range(4)] for w in range(2)}
              for s, split in enumerate(("pg19", "ao3"))}  # fmt: skip
    (home / "chapters_ctx_300.json").write_text(json.dumps(splits))


def _short_texts(home: Path) -> None:
    words = ("old", "new", "dull", "fine", "long", "loud")
    for name in ("mr", "subj"):
        (home / "icl" / name).mkdir(parents=True)
        for part, count in (("train", 24), ("test", 8)):
            draw = random.Random(f"{name} {part}")
            lines = [f'{draw.randrange(2)},"a {draw.choice(words)} {part} of {n}"' for n in range(count)]
            (home / "icl" / name / f"{part}.csv").write_text("\n".join(lines) + "\n")


def make_questions(home: Path, made_text: Callable[..., str]) -> None:
    """SQuAD's form: two questions about each of 15 passages to show and of 6 to ask."""
    for part, (name, paragraphs) in enumerate((("train", 5), ("dev", 2))):
        data = []
        for a in range(3):
            made = []
            for p in range(paragraphs):
                qas = [
                    {"id": f"{name}{a}{p}{q}", "question": f"Where is {a}{p}?", "answers": [{"text": text}]}
                    for q, text in enumerate(("yyyyyy", "the pppppp"))
                ]
                made.append({"context": made_text(6, 50 * part + 10 * a + p), "qas": qas})
            data.append({"title": f"Article_{a}", "paragraphs": made})
        (home / f"{name}.json").write_text(json.dumps({"version": "1.1", "data": data}))


def _talks(home: Path) -> None:
    """LoCoMo's form with all of its categories, and MSC's."""
    things = ("a dog", "a red boat", "an old piano, a canoe", "two cats; she likes them", "a tent")
    samples = []
    for c in range(4):
        spoken: dict[str, Any] = {"speaker_a": "Ada", "speaker_b": "Bo"}
        for s in (1, 2):
            spoken[f"session_{s}_date_time"] = f"{s}:00 pm on {c + 1} May, 2023"
            spoken[f"session_{s}"] = [
                {"speaker": ("Ada", "Bo")[n % 2], "text": f"I have {things[(c + n + s) % 5]} in room {n}."}
                for n in range(4)
            ]
        qa = [
            {"question": f"What has {'Ada' if n % 2 else 'Bo'} in room {n}?", "category": n % 5 + 1,
             ("adversarial_answer" if n % 5 == 4 else "answer"): things[(c + n) % 5]}
            for n in range(10)
        ]  # fmt: skip
        samples.append({"sample_id": f"talk-{c}", "conversation": spoken, "qa": qa})
    (home / "locomo.json").write_text(json.dumps(samples))
    lines = [
        {
            "dialog": [
                {"id": f"Speaker {n % 2 + 1}", "text": f"It is {n} days later, and I have {c}."} for n in range(5)
            ],
            "previous_dialogs": [
                {"dialog": [{"text": f"Hello {c}."}, {"text": "Good day."}], "time_num": s, "time_unit": "days"}
                for s in (3, 2)
            ],
            "metadata": {"initial_data_id": f"valid_{c}"},
        }
        for c in range(2)
    ]
    (home / "msc.txt").write_text("\n".join(map(json.dumps, lines)) + "\n")


def _stories(home: Path) -> None:
    """Two of bAbI's tasks."""
    (home / "babi").mkdir()
    places, people = ("attic", "barn", "cave", "yard"), ("Ann", "Bob", "Eve")
    for task in (1, 2):
        for part in ("train", "test"):
            draw, lines = random.Random(f"{task} {part}"), list[str]()
            for _ in range(6):
                where: dict[str, str] = {}
                for number in range(1, 3 * task + 1):
                    where[draw.choice(people)] = draw.choice(places)
                    who = list(where)[-1]
                    lines.append(f"{number} {who} went to the {where[who]}.")
                who = draw.choice(list(where))
                lines.append(f"{3 * task + 1} Where is {who}? \t{where[who]}\t1")
            (home / "babi" / f"qa{task}_made_{part}.txt").write_text("\n".join(lines) + "\n")
