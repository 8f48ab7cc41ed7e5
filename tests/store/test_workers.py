"""Encoding by several processes: the same bits as by one, whatever is killed or interrupted on the way."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.store.small import MODEL, open_small
from tests.store.workers import Others, ThreadLink, add, contents, load, open_store, save_backbone

from longmem.errors import StoreError
from longmem.store import MemoryStore, NewDocument, Progress, adding
from longmem.store.handover import Handover
from longmem.store.processes import _Child
from longmem.store.workers import AHEAD, workers_from

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_backbone(tmp_path_factory.mktemp("models") / "backbone")


@pytest.fixture(scope="module")
def alone(backbone: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    """Receipts and contents where one process does it all."""
    with open_store(tmp_path_factory.mktemp("alone") / "memory", load(backbone)) as store:
        return add(store, 1), contents(store)


def test_the_store_is_the_same_whoever_encodes(tmp_path: Path, backbone: str, alone: Any) -> None:
    workers = Others(ThreadLink, 3)
    told: list[int] = []
    with open_store(tmp_path / "memory", load(backbone)) as store:
        assert add(store, workers, progress=lambda progress: told.append(progress.done)) == alone[0]
        assert contents(store) == alone[1]
        assert {status for _, status, _ in add(store, workers)} == {"unchanged"}
        assert store.verify().clean
    assert len(workers.links) == 3  # of the second call nothing was left to encode
    assert all(link.most <= AHEAD for link in workers.links)
    assert told == sorted(told) and told[-1] == sum(document["tokens"] for document in alone[1]["alice"])


def test_a_backbone_without_a_name_and_one_that_has_changed_are_sent(tmp_path: Path, backbone: str, alone: Any) -> None:
    nameless = load(backbone)
    nameless.config.backbone_name_or_path = nameless.backbone.model.config._name_or_path = None
    with open_store(tmp_path / "memory", nameless) as store:
        assert add(store, Others(ThreadLink)) == alone[0]
        assert contents(store) == alone[1]
    changed = load(backbone)
    changed.backbone.model.get_input_embeddings().weight.data.mul_(1.5)
    other = type(changed)(changed.config, changed.backbone.model).eval()  # with the fingerprint of these weights
    with open_store(tmp_path / "own", other) as own, open_store(tmp_path / "sent", other) as sent:
        assert add(own, 1) == add(sent, Others(ThreadLink))
        assert contents(own) == contents(sent) != alone[1]


def test_an_interrupted_call_goes_on_where_it_stopped(
    tmp_path: Path, backbone: str, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adding, "COMMIT_SECONDS", 0.0)
    done: list[Progress] = []

    def tell(progress: Progress) -> None:
        done.append(progress)
        if len(done) == 6:
            raise KeyboardInterrupt

    with open_store(tmp_path / "memory", load(backbone)) as store:
        with pytest.raises(KeyboardInterrupt):
            add(store, Others(ThreadLink), progress=tell)
        assert store.verify().clean
        add(store, Others(ThreadLink))
        assert contents(store) == alone[1]


def test_what_cannot_be_encoded_is_said_as_by_one_process(tmp_path: Path, backbone: str) -> None:
    with open_store(tmp_path / "memory", load(backbone)) as store:
        for workers in (1, Others(ThreadLink)):
            with pytest.raises(StoreError, match="token id 99 is outside of the backbone's vocabulary of 64"):
                list(store.add_documents("alice", [NewDocument("x", ids=[99])], workers=workers))
        assert store.namespaces() == []


@pytest.mark.parametrize("workers", [0, -1, True, "two", "ray:0", "ray:x", 1.5, None])
def test_what_means_no_workers_is_refused(tmp_path: Path, workers: Any) -> None:
    with pytest.raises(StoreError, match="must be a number of processes, at least 1, or 'ray' or 'ray:N'"):
        workers_from(workers)
    with open_small(tmp_path / "memory") as store, pytest.raises(StoreError, match="must be a number"):
        list(store.add_documents("alice", [], workers=workers))


def test_a_model_of_another_kind_stays_in_one_process(tmp_path: Path) -> None:
    with open_small(tmp_path / "memory", model=MODEL) as store:
        with pytest.raises(StoreError, match="a NumberModel cannot be handed to other processes"):
            list(store.add_documents("alice", [NewDocument("x", ids=np.arange(9))], workers=2))
        assert len(list(store.add_documents("alice", [NewDocument("x", ids=np.arange(9))], workers="1"))) == 1


def test_processes_give_the_same_bits_and_one_that_is_killed_is_named(
    tmp_path: Path, backbone: str, alone: Any
) -> None:
    workers = Others(lambda number, handover: _Child(number + 1, handover), 1)
    with open_store(tmp_path / "memory", load(backbone)) as store:

        def kill(progress: Progress) -> None:
            if workers.links and workers.links[-1]._process is not None:  # not while known texts are passed over
                os.kill(workers.links[-1]._process.pid, signal.SIGKILL)

        with pytest.raises(StoreError, match=r"worker 1 \(process \d+\) was killed by signal 9 .* goes on from there"):
            add(store, workers, progress=kill)
        assert store.verify().clean
        add(store, workers)
        assert contents(store) == alone[1]
    assert [link._process.returncode for link in workers.links] == [-signal.SIGKILL] * 2  # and none is left


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=900,
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.mark.slow
def test_the_ranks_of_a_torchrun_encode_for_the_first_one(tmp_path: Path, backbone: str) -> None:
    done = run(tmp_path, *TORCHRUN, "2", "-m", "tests.store.rank_work", backbone, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "refused: token id 99 is outside" in done.stdout and "equal" in done.stdout


@pytest.mark.slow
def test_the_command_under_torchrun_and_with_processes(tmp_path: Path, byte_tokenizer: Any, tiny_backbone: Any) -> None:
    tiny_backbone.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "notes").mkdir()
    for number in range(6):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"{number} and so on. " * 300)
    command = ("memory", "add", "notes", "--model", "model", "--time", "2026-01-31")
    found = []
    for store, before in {"one": ("-m",), "two": (*TORCHRUN, "2", "-m"), "three": ("-m",)}.items():
        more = ("--workers", "3") if store == "three" else ()
        done = run(tmp_path, *before, "longmem", *command, "--store", store, *more)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 6
        with MemoryStore.open(tmp_path / store, tokenizer=byte_tokenizer, mode="read") as opened:
            found.append(contents(opened))
    assert found[0] == found[1] == found[2]
    done = run(tmp_path, "-m", "longmem", *command, "--append", "--workers", "2")
    assert done.returncode == 1 and "--append encodes one document at a time" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray")
def test_ray_actors_give_the_same_bits(tmp_path: Path, backbone: str) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from tests.store.workers import *; torch.set_num_threads(1)\n"
        "import ray\n"
        "for _ in range(4):  # Ray gives itself 30 seconds to start\n"
        "    try: ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False); break\n"
        "    except Exception as error: print(error)\n"
        "else: sys.exit(77)\n"
        "model, folder = load(sys.argv[1]), Path(sys.argv[2])\n"
        "with open_store(folder / 'alone', model) as alone, open_store(folder / 'ray', model) as store:\n"
        "    assert add(alone, 1) == add(store, 'ray:1')\n"
        "    assert contents(alone) == contents(store)\n"
        "    from longmem.errors import StoreError\n"
        "    try: list(store.add_documents('bob', [NewDocument('x', ids=[99])], workers='ray:1'))\n"
        "    except StoreError as error: print('refused:', error)\n"
        "    try: list(store.add_documents('bob', [NewDocument('x', ids=[9])], workers='ray:9999'))\n"
        "    except StoreError as error: print('too many:', error)\n"
        "print('equal')\n"
    )
    done = run(tmp_path, "-c", code, backbone, str(tmp_path), RAY_USAGE_STATS_ENABLED="0", RAY_worker_niceness="0")
    if done.returncode == 77:
        pytest.skip(f"Ray itself does not start here: {done.stdout.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert "refused: token id 99 is outside" in done.stdout and "equal" in done.stdout
    assert "too many: 9999 Ray actors need as many CPUs" in done.stdout


def test_ray_that_is_not_installed_is_named(tmp_path: Path, backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with (
        open_store(tmp_path / "memory", load(backbone)) as store,
        pytest.raises(StoreError, match=r"Ray is not installed; pip install 'longmem-lm\[ray\]'"),
    ):
        add(store, "ray")


def test_a_spread_backbone_encodes_in_one_process(tmp_path: Path, backbone: str) -> None:
    model = load(backbone)
    model.backbone.model.hf_device_map = {"a": 0, "b": 1}
    with open_store(tmp_path / "memory", model) as store, pytest.raises(StoreError, match="spread over devices"):
        Handover(store._room.encoding(), threads=None)
