"""One public list; importing it is cheap; the Auto classes know our models in either order of import."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import longmem


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_public_name_can_be_taken_and_says_what_it_is() -> None:
    for name in longmem.__all__:
        value = getattr(longmem, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"


def test_dir_lists_what_all_lists() -> None:
    assert set(longmem.__all__) <= set(dir(longmem))


def test_what_a_store_hands_out_and_what_explains_a_pass_are_public() -> None:
    from longmem.modeling.explain import Explanation
    from longmem.store.bank import SessionBank, StoreBank

    assert (longmem.StoreBank, longmem.SessionBank, longmem.Explanation) == (StoreBank, SessionBank, Explanation)
    assert {"StoreBank", "SessionBank", "Explanation"} <= set(longmem.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LongMen'"):
        _ = longmem.LongMen


def test_importing_longmem_imports_neither_torch_nor_transformers_and_warns_of_nothing() -> None:
    code = "import sys, longmem; assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_version_is_that_of_the_changelog() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"## [{longmem.__version__}]" in changelog


@pytest.fixture(scope="module")
def saved_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from longmem import AlibiGPTConfig, AlibiGPTForCausalLM

    path = tmp_path_factory.mktemp("backbone")
    config = AlibiGPTConfig(vocab_size=19, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    AlibiGPTForCausalLM(config).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "first_lines",
    [
        "from longmem import LongMemConfig\nfrom transformers import AutoModelForCausalLM",
        "from longmem import LongMem\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nfrom longmem import TrainingFree",
    ],
)
def test_auto_classes_load_an_alibi_gpt_once_a_model_of_ours_is_imported(
    first_lines: str, saved_backbone: Path
) -> None:
    code = f"{first_lines}\nimport sys\nprint(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    assert python(code, str(saved_backbone)).split() == ["AlibiGPTForCausalLM"]


@pytest.mark.parametrize("first", ["LongMem", "MemTRM", "TrainingFree", "AlibiGPTConfig"])
def test_auto_config_knows_all_our_model_types_whichever_came_first(first: str) -> None:
    types = {
        "alibi_gpt": "AlibiGPTConfig",
        "longmem": "LongMemConfig",
        "memtrm": "MemTRMConfig",
        "training_free": "TrainingFreeConfig",
    }
    code = (
        f"import json\nfrom longmem import {first}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        f"print(json.dumps([type(AutoConfig.for_model(t)).__name__ for t in {list(types)}]))"
    )
    assert json.loads(python(code)) == list(types.values())


def test_help_answers_within_half_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "longmem", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5
