"""What tests share: tiny random models, a byte tokenizer, text made here, and the markers' switches."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.calling import Command, Done
from tests.family_table import tiny_gpt
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from longmem import AlibiGPTForCausalLM, LongMem
from longmem.__main__ import main

SHARED = Path(os.environ.get("LONGMEM_SHARED_DIR") or Path(__file__).parents[1] / ".." / "shared")

disable_progress_bar()  # as the command line does, before it imports transformers
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers are the threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = {
        "slow": None if config.getoption("--slow") else "takes more than a minute; pass --slow",
        "gpu": None if torch.cuda.is_available() else "needs a GPU",
        "shared": None if SHARED.is_dir() else "the shared texts are not here; name their folder in LONGMEM_SHARED_DIR",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The project's shared texts; a test that takes this is marked ``shared``."""
    return SHARED


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("memory", "add", "notes")``: what ``longmem memory add notes`` leaves behind."""

    def call(*arguments: object) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        shown = capsys.readouterr()
        return Done(int(stop.value.code or 0), shown.out, shown.err)

    return call


@pytest.fixture
def tiny_backbone() -> AlibiGPTForCausalLM:
    """See ``tiny_gpt``; the same weights every time."""
    return tiny_gpt()


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """See ``make_byte_tokenizer``."""
    return make_byte_tokenizer()


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte behind ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``: 260 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def backbone_dir(tmp_path: Path, tiny_backbone: AlibiGPTForCausalLM, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The two as a folder."""
    tiny_backbone.save_pretrained(tmp_path / "backbone")
    byte_tokenizer.save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


def make_pair(home: Path, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """The folder of a random SideNet, with its backbone, which ends no text, beside it."""
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    tiny_gpt(max_position_embeddings=256, initializer_range=0.02, **ends).save_pretrained(home / "backbone")
    byte_tokenizer.save_pretrained(home / "backbone")
    model = LongMem.from_backbone(home / "backbone", chunk_size=4, num_retrieved=16, memory_size=4096)
    model.config.backbone_name_or_path = "../backbone"
    model.save_pretrained(home / "sidenet")
    return home / "sidenet"


@pytest.fixture(scope="session")
def made_text() -> Callable[..., str]:
    """``made_text(words, seed=0)``: sentences over a small vocabulary whose names come back far apart."""

    def make(words: int, seed: int = 0) -> str:
        draw = random.Random(seed)
        names = ["".join(draw.choices("abdegiklmnoprstu", k=6)).capitalize() for _ in range(5)]
        verbs, things = ["sees", "keeps", "loses", "finds"], ["a key", "the old map", "seven stones", "no answer"]
        sentences, count = [], 0
        while count < words:
            sentence = f"{draw.choice(names)} {draw.choice(verbs)} {draw.choice(things)}."
            count += len(sentence.split())
            sentences.append(sentence + ("\n" if draw.random() < 0.2 else " "))
        return "".join(sentences)

    return make


@pytest.fixture(scope="session")
def demo_folder(
    tmp_path_factory: pytest.TempPathFactory, made_text: Callable[..., str], byte_tokenizer: PreTrainedTokenizerFast
) -> Path:
    """A folder with a random pair in ``models/small``, and in ``runs/demo/text`` what ``make demo`` would leave."""
    root = tmp_path_factory.mktemp("work")
    make_pair(root / "models" / "small", byte_tokenizer)
    (root / "runs" / "demo" / "text").mkdir(parents=True)
    for seed, name in enumerate(("http", "email")):
        (root / "runs" / "demo" / "text" / f"{name}.txt").write_text(made_text(900, seed))
    return root
