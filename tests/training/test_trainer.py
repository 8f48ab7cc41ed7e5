"""``LongMemTrainer``: transformers.Trainer that reads texts in order, with their memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainingArguments

from longmem import LongMem
from longmem.data.steps import SegmentSteps, as_corpus
from longmem.data.stream import SegmentStream
from longmem.errors import CheckpointError, ConfigError, DataError
from longmem.memory import MemoryBank
from longmem.training.trainer import LongMemTrainer

Documents = list[dict[str, Any]]


@pytest.fixture
def documents(text_dir: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Documents:
    """Every text as one record."""
    paths = sorted(text_dir.glob("doc*.txt"))
    return [{"name": path.stem, "input_ids": byte_tokenizer(path.read_text())["input_ids"]} for path in paths]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "data_seed": 1,
    }
    return TrainingArguments(**{**settings, **changes})


def made(folder: Path, documents: Documents, backbone: Path, dropout: float = 0.0, **changes: Any) -> LongMemTrainer:
    torch.manual_seed(0)
    model = LongMem.from_backbone(backbone, memory_layer=1, num_retrieved=8, memory_size=64, side_dtype=torch.float32)
    ours = {
        name: changes.pop(name) for name in ("memory", "boundary", "piece_tokens", "eval_dataset") if name in changes
    }
    args = arguments(folder, **changes)
    return LongMemTrainer(model, args, train_dataset=documents, window=16, **{"piece_tokens": 40, **ours})


def losses(trainer: LongMemTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: LongMemTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.sidenet.named_parameters()}


def by_hand(trainer: LongMemTrainer, documents: Documents, accumulate: int, steps: int) -> list[float]:
    """The same training in plain words: read, backward, write; AdamW at a constant rate; clipped at 1."""
    model = trainer.model.train()
    stream = SegmentStream(as_corpus(documents), 16, 2, 1, piece_tokens=40)
    bank = MemoryBank.for_model(model, 2)
    optimiser = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    found = []
    for _ in range(steps):
        batches = [stream.next() for _ in range(accumulate)]
        count, total = sum(int((batch.targets != -100).sum()) for batch in batches), 0.0
        for batch in batches:
            if bool(batch.starts.any()):
                bank.end_document(batch.starts.nonzero().flatten())
            out = model(batch.ids, attention_mask=batch.mask, memory=bank, use_cache=False)
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            (loss / count).backward()
            total += loss.item() / count
            bank.add(out.kv, documents=batch.documents, offsets=batch.offsets)
        torch.nn.utils.clip_grad_norm_(model.trainable_parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize(("accumulate", "recompute"), [(1, False), (2, True)])
def test_it_trains_what_reading_and_writing_by_hand_trains(
    accumulate: int, recompute: bool, documents: Documents, backbone_dir: Path, tmp_path: Path
) -> None:
    settings = {"gradient_accumulation_steps": accumulate, "activation_checkpointing": recompute}
    trainer = made(tmp_path / "run", documents, backbone_dir, **settings)
    frozen = {name: weight.clone() for name, weight in trainer.model.backbone.state_dict().items()}
    trainer.train()
    other = made(tmp_path / "other", documents, backbone_dir)
    assert losses(trainer) == pytest.approx(by_hand(other, documents, accumulate, 6), abs=1e-3)
    after = trainer.model.backbone.state_dict()
    assert all(torch.equal(frozen[name], after[name]) for name in frozen)
    said = trainer.state.log_history[-2]
    assert 0 < said["memory_fill"] <= 1 and 0 < said["share_min"] <= said["share_max"] < 1


def test_epochs_go_on_where_rows_stood(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    few = [{**document, "input_ids": document["input_ids"][:100]} for document in documents]
    trainer = made(tmp_path / "run", few, backbone_dir, max_steps=-1, num_train_epochs=2)
    trainer.train()
    steps = trainer.state.max_steps
    assert steps == 2 * round(600 / 32)
    assert losses(trainer) == pytest.approx(by_hand(made(tmp_path / "o", few, backbone_dir), few, 1, steps), abs=1e-3)


def test_a_resumed_run_is_the_uninterrupted_one(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2, "dropout": 0.2}
    whole = made(tmp_path / "whole", documents, backbone_dir, boundary="reset", **settings)
    whole.train()
    folder = tmp_path / "whole" / "checkpoint-3"
    assert {path.name for path in folder.iterdir()} >= {"sidenet.safetensors", "memory-0-of-1.pt", "trainer_state.json"}
    assert not list(folder.glob("model*"))
    cut = made(tmp_path / "cut", documents, backbone_dir, boundary="reset", **settings)
    cut.train(resume_from_checkpoint=str(folder))
    assert losses(cut) == losses(whole)
    expected = weights(whole)
    assert all(torch.equal(expected[name], weight) for name, weight in weights(cut).items())


def test_only_whole_checkpoints_are_resumed_from(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2}
    made(tmp_path / "run", documents, backbone_dir, **settings).train()
    (tmp_path / "run" / "checkpoint-6" / "memory-0-of-1.pt").unlink()
    again = made(tmp_path / "run", documents, backbone_dir, **settings)
    with pytest.raises(CheckpointError, match=r"checkpoint-6: not whole, memory-0-of-1\.pt missing; resume from check"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    again.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in again.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(CheckpointError, match="no whole checkpoint; train without resuming"):
        made(tmp_path / "none", documents, backbone_dir).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"piece_tokens": 50}, "piece_tokens was 40, is 50"),
        ({"per_device_train_batch_size": 3}, "rows was 2, is 3"),
        ({"boundary": "reset"}, "boundary was keep, is reset"),
    ],
)
def test_other_rows_or_texts_are_not_resumed(
    changes: dict[str, Any], line: str, documents: Documents, backbone_dir: Path, tmp_path: Path
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    made(tmp_path / "run", documents, backbone_dir, **settings).train()
    other = made(tmp_path / "run", documents, backbone_dir, **{**settings, "max_steps": 4, **changes})
    with pytest.raises(CheckpointError, match=line):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_a_checkpoint_of_other_processes_is_refused(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", documents, backbone_dir, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-2"
    for rank in range(2):
        shutil.copy(folder / "memory-0-of-1.pt", folder / f"memory-{rank}-of-2.pt")
    (folder / "memory-0-of-1.pt").unlink()
    with pytest.raises(CheckpointError, match="written by 2 processes, there are 1; start as many"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_evaluation_reads_documents_with_a_memory_of_its_own(
    documents: Documents, backbone_dir: Path, tmp_path: Path
) -> None:
    trainer = made(tmp_path / "run", documents, backbone_dir, eval_dataset={"a": documents[:2], "b": documents[2:]})
    trainer.train()
    before = trainer.bank.state_dict()
    found = trainer.evaluate()
    after = trainer.bank.state_dict()
    assert torch.equal(before["slots"]["storage"], after["slots"]["storage"]) and before["version"] == after["version"]
    model, corpus = trainer.model.eval(), as_corpus(documents[:2])
    stream, bank = SegmentStream(corpus, 16, 2, None), MemoryBank.for_model(model, 2)
    total, count = 0.0, 0
    for _ in range(max(1, round(corpus.num_tokens / 32))):
        batch = stream.next()
        if bool(batch.starts.any()):
            bank.end_document(batch.starts.nonzero().flatten())
        with torch.no_grad():
            out = model(batch.ids, attention_mask=batch.mask, memory=bank, use_cache=False)
        bank.add(out.kv, documents=batch.documents, offsets=batch.offsets)
        total += float(
            torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        )
        count += int((batch.targets != -100).sum())
    assert found["eval_a_loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["eval_b_loss"] > 0


def test_metrics_see_the_logits(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def accuracy(prediction: Any) -> dict[str, float]:
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        real = prediction.label_ids != -100
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids)[real].mean())}

    torch.manual_seed(0)
    model = LongMem.from_backbone(backbone_dir, memory_layer=1, num_retrieved=8, memory_size=64)
    trainer = LongMemTrainer(
        model, arguments(tmp_path), eval_dataset=documents[:2], window=16, compute_metrics=accuracy
    )
    assert 0 <= trainer.evaluate()["eval_accuracy"] <= 1
    assert seen["shapes"][0] == (*seen["shapes"][1], 260)


def test_the_control_has_no_memory_and_its_gate_stays(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", documents, backbone_dir, memory=False)
    trainer.train()
    assert trainer.bank is None
    assert not trainer.model.sidenet.memory_gate.any()


def test_bf16_is_trainers_own(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", documents, backbone_dir, bf16=True, max_steps=2)
    trainer.train()
    plain = made(tmp_path / "plain", documents, backbone_dir, max_steps=2)
    plain.train()
    assert losses(trainer) != losses(plain)
    assert losses(trainer) == pytest.approx(losses(plain), rel=0.05)


def test_a_trained_sidenet_loads_by_itself(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    trainer = made(tmp_path / "run", documents, backbone_dir, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    loaded = LongMem.from_pretrained(tmp_path / "final")
    ids = torch.randint(4, 260, (2, 8))
    torch.testing.assert_close(loaded(ids).logits, trainer.model.eval()(ids).logits)
    assert load_file(tmp_path / "final" / "sidenet.safetensors")


def test_what_would_tear_texts_apart_is_refused_in_one_line_each(backbone_dir: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(backbone_dir)
    args = arguments(tmp_path, auto_find_batch_size=True, accelerator_config={"split_batches": True})
    with pytest.raises(ConfigError) as raised:
        LongMemTrainer(model, args, model_init=lambda: model)
    said = str(raised.value)
    for part in ("must be a LongMem", "auto_find_batch_size", "split_batches", "model_init is not taken"):
        assert part in said


def test_records_without_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="record 0 has no input_ids"):
        as_corpus([{"text": "words"}])
    with pytest.raises(DataError, match="give documents"):
        as_corpus([{"input_ids": []}])


def test_items_depend_on_nothing_but_their_number(documents: Documents) -> None:
    corpus = as_corpus(documents)
    steps, stream = SegmentSteps(corpus, 16, 4, 3, piece_tokens=40), SegmentStream(corpus, 16, 4, 3, piece_tokens=40)
    expected = [stream.next() for _ in range(10)]
    for step, row in ((9, 3), (0, 0), (4, 2), (4, 1)):
        item = steps[step * 4 + row]
        assert torch.equal(item["input_ids"], expected[step].ids[row])
        assert steps.name(int(item["text"])) == expected[step].documents[row]
        assert int(item["offset"]) == expected[step].offsets[row]
    steps.set_epoch(1)
    stream.seek(steps.steps)
    assert torch.equal(steps[1]["labels"], stream.here().targets[1])


@pytest.mark.slow
def test_two_processes_train_what_one_trains(documents: Documents, backbone_dir: Path, tmp_path: Path) -> None:
    """Run this very file in two processes, once uninterrupted and once resumed."""
    one = made(tmp_path / "one", documents, backbone_dir, per_device_train_batch_size=4)
    one.train()
    torch.save(documents, tmp_path / "documents.pt")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run(
        [*command, str(tmp_path), str(backbone_dir)], env=environment, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[:4000]
    whole, resumed = torch.load(tmp_path / "losses.pt")
    assert whole == pytest.approx(losses(one), abs=1e-4)
    assert resumed == whole
    files = {path.name for path in (tmp_path / "whole" / "checkpoint-3").glob("memory-*")}
    assert files == {"memory-0-of-2.pt", "memory-1-of-2.pt"}


def _in_every_process(folder: Path, backbone: Path) -> None:
    torch.set_num_threads(1)
    documents = torch.load(folder / "documents.pt")
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = made(folder / "whole", documents, backbone, **settings)
    whole.train()
    resumed = made(folder / "resumed", documents, backbone, **settings)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-3"))
    if int(os.environ["RANK"]) == 0:
        torch.save((losses(whole), losses(resumed)), folder / "losses.pt")


if __name__ == "__main__":
    _in_every_process(Path(sys.argv[1]), Path(sys.argv[2]))
