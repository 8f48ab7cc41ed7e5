"""Every task through its command, on systems of every kind: the numbers of the tagged commit ``house-before``.

``golden.json`` is what ``measured`` returned at that tag, for each task, on the data of the folder ``home``. Facts with
passages in the window are newer: passages stand in the order of their age now.
"""

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.calling import Command
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import LongMem, MemTRM

HERE = Path(__file__).parent
SYSTEMS = "--control control --memtrm memtrm --training-free 0.3 --memory-sizes 256 --window 128 --resamples 20"
ASKED = {
    "chapterbreak": "--data chapters_ctx_300.json --prefix 20,100,300 --suffix-tokens 16",
    "icl": "--data icl --datasets mr,subj --local-shots 1,3 --memory-shots 0,10 --seeds 2 --limit 6 --full-context 384",
    "squad": "--train train.json --data dev.json --local-shots 1 --memory-shots 0,4 --seeds 2 --limit 12 "
             "--max-answer-tokens 6",
    "needle": "--data text.txt --kinds passkey,multi --lengths 1k,2k --depths 3 --trials 2",
    "dialogue": "--data locomo.json --data msc.txt --new-tokens 6 --full-context 384",
    "facts": "--data text.txt --between 64,512 --sessions 2 --facts 5 --recall 2 --new-tokens 8",
    "babi": "--data babi --text text.txt --tasks 1,2 --lengths 512,1k --trials 2 --recall 1",
}  # fmt: skip
"""Arguments of ``longmem eval TASK`` beside the systems; some tens of examples of each."""
MEMORY: dict[str, Any] = {"chunk_size": 4, "num_retrieved": 16, "memory_size": 512}


def disturb(model: torch.nn.Module, seed: str, spread: float, names: Callable[[str], bool] = lambda name: True) -> None:
    """Add noise to every matrix; by its name, so that the order in which parameters are made does not matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and names(name):
                draw = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=spread)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: Any) -> Path:
    """A file for every task, and checkpoints ``side``, ``control`` and ``memtrm`` over one backbone."""
    home = tmp_path_factory.mktemp("golden") / "home"  # the folder's name is part of names in results
    shutil.copytree(HERE / "home", home)
    config = LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.fill_(float(parameter.ndim == 1))
    disturb(backbone, "backbone", 0.25)
    with torch.no_grad():  # so that some of what is generated is what is expected
        backbone.lm_head.weight[byte_tokenizer(" xynp")["input_ids"]] *= 4
    backbone.save_pretrained(home / "backbone")
    byte_tokenizer.save_pretrained(home / "backbone")
    for name in ("side", "control"):
        side = LongMem.from_backbone(home / "backbone", memory_layer=2, **MEMORY)
        disturb(side, name, 0.05, set(side.trainable_parameter_names()).__contains__)
        side.save_pretrained(home / name)
    trm: Any = MemTRM.from_backbone(home / "backbone", memory_layer=2, **MEMORY)
    disturb(trm, "memtrm", 0.02)
    trm.save_pretrained(home / "memtrm")
    return home


def measured(command: Command, task: str, out: Path) -> dict[str, Any]:
    """Values of every example, means and differences of every group, as ``longmem eval`` writes them."""
    done = command("eval", task, "--model", "side", *SYSTEMS.split(), *ASKED[task].split(), "--out", out)
    assert done.status == 0, done.err
    result = json.loads((out / f"{task}.json").read_text())
    metrics = [metric["name"] for metric in result["metrics"]]
    return {
        "systems": list(result["systems"]),
        "metrics": metrics,
        "examples": {
            example["id"]: [[round(value[name], 5) for name in metrics] for value in example["values"].values()]
            for example in result["examples"]
        },
        "groups": {
            group["group"]: {f"{one['system']} {one['metric']}": _rounded(one) for one in group["scores"]}
            | {"size": [group["examples"], group["units"]]}
            for group in result["groups"]
        },
        "differences": {
            f"{one['system']} - {one['against']}, {one['metric']}": _rounded(one)
            for one in result["groups"][-1]["differences"]
        },
        "extra": result["extra"],
        "said": _said(out / "answers.jsonl") if task == "dialogue" else [],
    }


def _said(answers: Path) -> list[str]:
    """The first lines of what was generated, in the order of systems and examples."""
    lines = [json.loads(line) for line in answers.read_text().split("\n") if line] if answers.exists() else []
    lines.sort(key=lambda line: (line["system"], line["example"]))
    return [next((one.strip() for one in line["said"].splitlines() if one.strip()), "") for line in lines]


def _rounded(score: dict[str, Any]) -> list[float]:
    edges = score["interval"]
    return [round(score["value"], 5), *([] if edges is None else [round(edges[name], 5) for name in ("low", "high")])]


@pytest.mark.parametrize("task", ASKED)
def test_every_number_is_that_of_the_tagged_commit(
    task: str, home: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    expected, found = json.loads((HERE / "golden.json").read_text())[task], measured(command, task, tmp_path)
    leaves, known = _leaves(found), _leaves(expected)
    assert {at: leaves[at] for at in known} == {
        at: leaf if isinstance(leaf, str) else pytest.approx(leaf, abs=1e-4) for at, leaf in known.items()
    }
    assert found["systems"] == expected["systems"] and found["examples"].keys() == expected["examples"].keys()


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {at: leaf for name, inner in pairs for at, leaf in _leaves(inner, f"{path}/{name}").items()}
    return {path: value}
