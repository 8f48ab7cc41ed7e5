"""One public list; importing it is cheap; the Auto classes know our models."""

import subprocess
import sys
from pathlib import Path

import pytest
from tests.family_table import tiny_gpt

import longmem


def test_every_public_name_can_be_taken_and_says_what_it_is() -> None:
    for name in longmem.__all__:
        value = getattr(longmem, name)
        assert name == "__version__" or value.__doc__, f"{name} has no docstring"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LongMen'"):
        _ = longmem.LongMen


def test_version_is_that_of_the_changelog() -> None:
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert f"## [{longmem.__version__}]" in changelog


def test_the_auto_classes_know_our_models_once_any_name_of_ours_is_imported(tmp_path: Path) -> None:
    tiny_gpt().save_pretrained(tmp_path)
    code = (
        "import sys\nfrom longmem import LongMemConfig\nfrom transformers import AutoConfig, AutoModelForCausalLM\n"
        "for name in ('longmem', 'memtrm', 'training_free', 'alibi_gpt'):\n"
        "    print(type(AutoConfig.for_model(name)).__name__)\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
    known = ["LongMemConfig", "MemTRMConfig", "TrainingFreeConfig", "AlibiGPTConfig", "AlibiGPTForCausalLM"]
    assert done.stdout.split() == known, done.stderr
