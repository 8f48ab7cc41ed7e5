"""``LongMemTrainer``: transformers.Trainer that reads texts in order, with their memory, or asks for hidden facts."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from tests.training.conftest import ASK, Make
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from longmem import LongMem, MemTRM
from longmem.data.stream import IGNORE, SegmentStream
from longmem.data.tokens import as_corpus
from longmem.errors import CheckpointError, ConfigError
from longmem.memory import MemoryBank
from longmem.training import LongMemTrainer
from longmem.training.run import build_trainer

Documents = list[dict[str, Any]]


@pytest.fixture
def documents(text_dir: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Documents:
    """The beginning of every text as one record."""
    paths = sorted(text_dir.glob("doc*.txt"))
    return [{"name": path.stem, "input_ids": byte_tokenizer(path.read_text())["input_ids"][:100]} for path in paths]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "max_steps": 6,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "disable_tqdm": True, "data_seed": 1,
    }  # fmt: skip
    return TrainingArguments(**{**settings, **changes})


def made(args: TrainingArguments, documents: Documents, backbone: Path, **settings: Any) -> LongMemTrainer:
    torch.manual_seed(0)
    model = LongMem.from_backbone(backbone, memory_layers=1, num_retrieved=8, memory_size=64, side_dtype=torch.float32)
    return LongMemTrainer(model, args, train_dataset=documents, window=16, **{"piece_tokens": 40, **settings})


def by_hand(model: Any, stream: SegmentStream, steps: int, accumulate: int = 1, optimiser: Any = None) -> Any:
    """Sums of losses, and of how many tokens, of steps in plain words; trained with an optimiser, clipped at 1."""
    bank, sums = MemoryBank.for_model(model.train(optimiser is not None), 2), []
    for _ in range(steps):
        sums.append([0.0, 0])
        for _ in range(accumulate):
            batch = stream.next()
            if bool(batch.starts.any()):
                bank.end_document(batch.starts.nonzero().flatten())
            out = model(batch.ids, attention_mask=batch.mask, memory=bank, use_cache=False)
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            count = int((batch.targets != -100).sum())
            if optimiser is not None:
                (loss / count / accumulate).backward()
            bank.add(out.kv, documents=batch.documents, offsets=batch.offsets)
            sums[-1] = [sums[-1][0] + loss.item(), sums[-1][1] + count]
        if optimiser is not None:
            torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
    return torch.tensor(sums).T


@pytest.mark.parametrize(
    ("accumulate", "settings"),
    [(1, {}), (2, {"activation_checkpointing": True}), (1, {"max_steps": -1, "num_train_epochs": 2})],
    ids=["steps", "accumulated and recomputed", "epochs, which go on where rows stood"],
)
def test_it_trains_and_measures_what_reading_and_writing_by_hand_does(
    accumulate: int, settings: dict[str, Any], documents: Documents, backbone_dir: Path, tmp_path: Path
) -> None:
    args = arguments(tmp_path / "run", gradient_accumulation_steps=accumulate, **settings)
    trainer = made(args, documents, backbone_dir, eval_dataset=documents[:2])
    trainer.train()
    steps, history = trainer.state.max_steps, trainer.state.log_history
    assert steps == (2 * round(600 / 32) if "num_train_epochs" in settings else 6)
    model = made(arguments(tmp_path / "other"), documents, backbone_dir).model
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    stream = SegmentStream(as_corpus(documents), 16, 2, 1, piece_tokens=40)
    losses, counts = by_hand(model, stream, steps, accumulate, optimiser)
    expected = (losses / counts).tolist()
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(expected, abs=1e-3)
    assert 0 < history[-2]["memory_fill"] <= 1 and all(0 < share < 1 for share in history[-2]["share"])
    before = trainer.bank.state_dict()
    found = trainer.evaluate()["eval_loss"]
    after = trainer.bank.state_dict()
    assert torch.equal(before["slots"]["storage"], after["slots"]["storage"]) and before["version"] == after["version"]
    corpus = as_corpus(documents[:2])
    losses, counts = by_hand(trainer.model, SegmentStream(corpus, 16, 2, None), corpus.num_tokens // 32)
    assert found == pytest.approx(float(losses.sum() / counts.sum()), rel=1e-5)
    assert trainer.evaluate(documents[2:])["eval_loss"] != found


def test_other_rows_or_texts_are_not_resumed(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    made(arguments(tmp_path, **saving), documents, backbone_dir).train()
    args = arguments(tmp_path, per_device_train_batch_size=3, **saving)
    other = made(args, documents, backbone_dir, piece_tokens=50, boundary="reset")
    lines = "rows was 2, is 3; piece_tokens was 40, is 50; boundary was 'keep', is 'reset'"
    for folder, message in {True: lines, str(backbone_dir): "no checkpoint; train without resuming"}.items():
        with pytest.raises(CheckpointError, match=message):
            other.train(resume_from_checkpoint=folder)


def test_what_would_tear_texts_apart_is_refused_in_one_line_each(
    documents: Documents, backbone_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"model .* must be a LongMem or a MemTRM"):
        LongMemTrainer(AutoModelForCausalLM.from_pretrained(backbone_dir), arguments(tmp_path), train_dataset=documents)
    args = arguments(tmp_path, auto_find_batch_size=True, per_device_train_batch_size=1)
    message = r"auto_find_batch_size would change the rows.*; compute_metrics is not taken"
    with pytest.raises(ConfigError, match=message):
        made(args, documents, backbone_dir, compute_metrics=len)


@pytest.mark.parametrize("kind", [LongMem, MemTRM])
def test_a_plain_trainer_resumes_and_keeps_the_best_model(kind: Any, backbone_dir: Path, tmp_path: Path) -> None:
    """Without our subclass: no memory, but the weights are found again."""
    torch.manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(4, 260, (16, 12))]
    steps = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    # the highest loss is called the best, because it is not the last
    kept = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}

    def plain(folder: str) -> Trainer:
        torch.manual_seed(1)
        dtype = {"side_dtype": torch.float32} if kind is LongMem else {}
        model = kind.from_backbone(backbone_dir, memory_layers=1, num_retrieved=8, memory_size=64, **dtype)
        args = arguments(tmp_path / folder, learning_rate=0.1, **steps, **kept)
        return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:4])

    whole, cut = plain("whole"), plain("cut")
    whole.train()
    evaluated = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert max(evaluated) > evaluated[-1]
    assert whole.evaluate()["eval_loss"] == pytest.approx(max(evaluated), abs=1e-6)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert [e["eval_loss"] for e in cut.state.log_history if "eval_loss" in e][: len(evaluated)] == evaluated
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(expected[name], weight) for name, weight in cut.model.named_parameters())


# facts that are hidden in memory


def test_only_the_answer_is_scored_and_it_is_hidden_in_the_rows_own_facts_among_the_common_text(
    adapt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = adapt(needles={**ASK, "kinds": ["passkey", "pair", "multi", "twohop"]})
    trainer = build_trainer(recipe, PartialState(cpu=True), quiet=True)
    assert trainer.bank is None  # of which a run of questions writes nothing
    stream, batch = trainer.stream, trainer.next_batch()
    assert batch.ids.shape == batch.targets.shape and len(batch.ids) == 4
    assert batch.memory.base.keys.shape[2] * 4 == 32, "one run of text for all rows"
    own = [len(asked.keys) for asked in stream._asked.values()]
    assert batch.memory.bank.tokens.tolist() == own and len(set(own)) > 1
    assert math.isfinite(float(trainer.compute_loss(trainer.model, batch).detach()))
    encoded: list[torch.Tensor] = []
    encode = LongMem.encode
    monkeypatch.setattr(LongMem, "encode", lambda model, ids: (encoded.append(ids), encode(model, ids))[1])
    for number in range(20):
        ids, targets, keys, _ = stream._question(number)
        answer = targets[targets != IGNORE]
        assert encoded[-1].shape[1] == 48 and len(keys) == encoded[-1].numel()
        assert stream.tokenizer.decode(answer).split()[-1] in stream.tokenizer.decode(encoded[-1].flatten())
        assert targets[-len(answer) :].tolist() == answer.tolist()
        assert ids[1:].tolist() == [*ids[1 : -len(answer) + 1].tolist(), *answer[:-1].tolist()]


def test_memory_grows_from_the_least_to_the_most(adapt: Make) -> None:
    stream, largest = build_trainer(adapt(needles=ASK), PartialState(cpu=True), quiet=True).stream, []
    for number in (0, 2, 4, 9):
        sizes = []
        for stream.seed in range(8):
            sizes.append(stream._background(number).capacity_tokens)
        largest.append(max(sizes))
    assert largest[0] == 32
    assert largest[0] < largest[1] < largest[2] == largest[3] == 256
