"""lm-evaluation-harness: the stock numbers where all fits the window, a memory for each request where it does not."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.calling import Command
from tests.evaluation.pairs import by_hand, remembered
from transformers import PreTrainedTokenizerFast

from longmem import LongMem
from longmem.evaluation.asking import Asker

Instance = pytest.importorskip("lm_eval.api.instance", reason="lm-evaluation-harness is not installed").Instance
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM

TASKS: dict[str, dict[str, Any]] = {
    "names_choice": {
        "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_target": "label",
        "doc_to_choice": ["key", "map", "old stones"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "names_rolling": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}], "metadata": {"version": 2},
    },
}  # fmt: skip
Make = Callable[[int | None, int], Any]


def requests(kind: str, *arguments: Any) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def long_text(model: LongMem, tokens: list[int], scored: int) -> float:
    """Of the last tokens: what does not fit the window is in memory."""
    cut = max(0, len(tokens) - 1 - 32)
    return by_hand(model, remembered(model, tokens[:cut], window=32), tokens[cut:-scored], tokens[-scored:])


@pytest.fixture
def texts(made_text: Callable[..., str]) -> list[str]:
    return [made_text(words, seed=words).strip() for words in (4, 20, 60, 33)]


@pytest.fixture
def memory_lm(home: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Make:
    """``memory_lm(memory, batch)``: the harness's model over the same LongMem, with a window of 32 tokens."""
    from longmem.evaluation.harness import MemoryLM

    model, how = LongMem.from_pretrained("side/final"), {"tokenizer": byte_tokenizer, "window": 32}
    return lambda memory, batch: MemoryLM(Asker("it", "it", {}, model, memory, rows=batch, **how))


@pytest.mark.parametrize("batch", [1, 3])
def test_without_memory_every_number_is_the_stock_classs(batch: int, memory_lm: Make, texts: list[str]) -> None:
    mine = memory_lm(None, batch)
    stock = HFLM(mine.asker.model, tokenizer=mine.asker.tokenizer, max_length=32, batch_size=batch)
    pairs = ((text, said) for text in texts for said in (" the key", " old stones"))
    asked = requests("loglikelihood", *pairs, ("", "a"))
    for one, other in zip(mine.loglikelihood(asked), stock.loglikelihood(asked), strict=True):
        assert one == (pytest.approx(other[0], abs=1e-4), other[1])
    asked = requests("loglikelihood_rolling", *((text,) for text in texts))
    assert mine.loglikelihood_rolling(asked) == pytest.approx(stock.loglikelihood_rolling(asked), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 5, "do_sample": False}
    asked = requests("generate_until", *((text, settings) for text in texts))
    assert mine.generate_until(asked) == stock.generate_until(asked)


@pytest.mark.parametrize("batch", [1, 4])
def test_what_does_not_fit_is_read_into_a_memory_of_the_request_alone(
    batch: int, memory_lm: Make, texts: list[str]
) -> None:
    lm = memory_lm(64, batch)
    pairs = [(text, answer) for text in texts for answer in (" the key", " no stones")]
    found = [logprob for logprob, _ in lm.loglikelihood(requests("loglikelihood", *pairs))]
    for (text, answer), logprob in zip(pairs, found, strict=True):
        tokens = lm.asker.tokenizer(text + answer)["input_ids"]
        assert logprob == pytest.approx(long_text(lm.asker.model, tokens, len(answer)), abs=1e-4)
    # each window of a rolling text has all before it in memory: three of 32 bytes, the first after the prefix token
    whole = [text[:96] for text in texts[1:]]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((text,) for text in whole)))
    for text, logprob in zip(whole, found, strict=True):
        tokens = lm.asker.tokenizer(text)["input_ids"]
        windows = ([lm.prefix_token_id, *tokens[:32]], tokens[:64], tokens)
        assert logprob == pytest.approx(sum(long_text(lm.asker.model, w, 32) for w in windows), abs=1e-3)
    settings = {"until": ["."], "max_gen_toks": 8, "do_sample": False}
    asked = requests("generate_until", *((text, settings) for text in texts))
    said, without = lm.generate_until(asked), memory_lm(None, 1).generate_until(asked)
    assert said == memory_lm(64, 1).generate_until(asked)
    assert said[0] == without[0] and said[1:] != without[1:]


def test_the_command_runs_tasks_of_a_folder_on_every_system(
    home: Path, made_text: Callable[..., str], tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tasks over four documents, the longest many windows long; without the documents one line says so."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    records = [{"text": made_text(words, seed=words).strip(), "label": words % 3} for words in (5, 12, 40, 90)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "data.jsonl")}}}
    (tmp_path / "tasks").mkdir()
    for name, task in TASKS.items():  # JSON is YAML
        about = {"task": name, "test_split": "test", **data, **task}
        (tmp_path / "tasks" / f"{name}.yaml").write_text(json.dumps(about))
    chosen = ("--model", "side", "--include", tmp_path / "tasks", "--memory-sizes", 64, "--window", 32, "--batch", 2)
    both = ",".join(TASKS)
    result = command("eval", "harness", *chosen, "--tasks", both, "--json", "--out", tmp_path / "out").json
    assert result == json.loads((tmp_path / "out" / "harness.json").read_text())
    assert list(result["systems"]) == ["backbone", "memory_off", "memory_64"]
    found = {task: list(metrics) for task, metrics in result["tasks"].items()}
    assert found == {"names_choice": ["acc"], "names_rolling": ["byte_perplexity"]}
    rolling = {name: score["value"] for name, score in result["tasks"]["names_rolling"]["byte_perplexity"].items()}
    assert len(set(rolling.values())) == 3 and all(math.isfinite(value) for value in rolling.values())
    assert result["versions"]["names_rolling"] == 2
    assert result["header"]["samples"] == dict.fromkeys(TASKS, 4)
    shown = command("eval", "harness", *chosen, "--tasks", both, "--limit", 1).out
    assert "names_rolling" in shown and "SideNet, memory off" in shown
    (tmp_path / "data.jsonl").unlink()
    for tasks, said in (
        ("names_choice,nothing_like_it", "tasks (nothing_like_it) is not known to lm-evaluation-harness nor in"),
        ("names_choice", "the data of names_choice cannot be read"),
    ):
        assert said in command("eval", "harness", *chosen, "--tasks", tasks).error
