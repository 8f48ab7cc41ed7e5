"""Recipes: read from TOML, overridden, and refused with every problem at once."""

from pathlib import Path
from typing import Any

import pytest

from longmem.errors import ConfigError
from longmem.training.recipe import Recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
SIDE = {"task": "adapt", "backbone": {"path": "x"}}


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        Recipe.parse({"task": "pretrain", "data": {"paths": ["x"]}, "optim": {"steps": 1}, **sections})
    assert all("\n" not in line for line in raised.value.problems)
    return raised.value.problems


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_the_repository_is_valid_and_has_a_header(path: Path) -> None:
    Recipe.load(path)
    header = path.read_text(encoding="utf-8").split("task =")[0]
    assert all(word in header for word in ("# trains ", "# hardware ", "longmem train "))


def test_three_mistakes_are_reported_together() -> None:
    sidenet, optim = {"num_retrieved": 50, "memry_size": 1024}, {"lr": "fast", "steps": 1}
    assert problems(**SIDE, sidenet=sidenet, optim=optim) == [
        "sidenet.memry_size is no setting; did you mean sidenet.memory_size?",
        "optim.lr ('fast') should be a number, unable to parse string as a number",
        "sidenet.num_retrieved (50) must be a multiple of chunk_size (4); try 48 or 52",
    ]


WSD = {"steps": 1, "schedule": "wsd", "warmup": 0.5, "decay_fraction": 0.6}
RULES: dict[str, dict[str, Any]] = {
    "run.lr is no setting; did you mean optim.lr?": {"run": {"lr": 1e-3}},
    "optmi is no setting; did you mean optim?": {"optmi": {"lr": 1e-3}},
    "zebra is no setting; remove it": {"zebra": {"x": 1}},
    "log.every (0) should be greater than or equal to 1": {"log": {"every": 0}},
    "sidenet.memory_layers ('b') should be a list, or should be 'auto'": {"sidenet": {"memory_layers": "b"}},
    "run.out_dir (3) should be a path, in quotes": {"run": {"out_dir": 3}},
    "task ('prune') should be 'pretrain' or 'adapt'": {"task": "prune"},
    "data.paths is empty; ": {"data": {}},
    "backbone.path is missing; ": {"task": "adapt"},
    "optim.steps, optim.tokens and optim.max_minutes are all missing; ": {"optim": {}},
    "model.hidden_size (100) must be a multiple of model.heads (8)": {"model": {"hidden_size": 100}},
    "optim.steps (1) and optim.tokens (1) do not go together: keep one": {"optim": {"steps": 1, "tokens": 1}},
    "optim.betas (1.5) should be less than 1": {"optim": {"steps": 1, "betas": [0.9, 1.5]}},
    "data.window (2) is too small for a passage": {"data": {"paths": ["x"], "window": 2, "repeat_fraction": 0.1}},
    "optim.warmup (0.5) and optim.decay_fraction (0.6) exceed the run": {"optim": WSD},
    "only a SideNet is recomputed; take fewer": {"optim": {"steps": 1, "gradient_checkpointing": True}},
    "needles.least_tokens (9000) must not exceed needles.most_tokens (100)": {
        **SIDE, "needles": {"kinds": ["passkey"], "least_tokens": 9000, "most_tokens": 100}
    },
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_what_is_wrong_is_named_with_what_would_be_right(rule: str) -> None:
    [found] = problems(**RULES[rule])
    assert rule in found


@pytest.mark.parametrize("written", ["memory_layer", "memory_layers"])
def test_overrides_take_toml_values_bare_words_and_both_names_of_layers(tmp_path: Path, written: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'task = "adapt"\n[data]\npaths = ["a"]\n[backbone]\npath = "b"\n[optim]\nsteps = 5\n[sidenet]\n{written} = 3\n'
    )
    recipe = Recipe.load(path, ["optim.lr=1e-3", "run.name=other", 'data.paths=["b", "c"]', "data.window = 32"])
    assert (recipe.optim.lr, recipe.run.name, recipe.data.paths, recipe.data.window) == (1e-3, "other", ("b", "c"), 32)
    assert recipe.out_dir == Path("runs/other") and recipe.sidenet.memory_layers == (3,)
    for override, layers in ("memory_layer=5", (5,)), ("memory_layers=[1, 3]", (1, 3)):
        assert Recipe.load(path, [f"sidenet.{override}"]).sidenet.memory_layers == layers
    with pytest.raises(ConfigError) as raised:
        Recipe.load(path, ["optim.lr", "optim.lrr=1", "task.x=1"])
    assert raised.value.problems == [
        "--set optim.lr is not section.name=value; write e.g. --set optim.lr=1e-3",
        "--set task.x=1: task is a value, not a section",
        "optim.lrr is no setting; did you mean optim.lr?",
    ]


def test_a_recipe_of_the_package_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("tiny-cpu")
    assert recipe.run.name == "tiny-cpu"
    assert all(Path(path).is_dir() for path in recipe.data.paths), "it trains on the package's own source"
    (tmp_path / "broken.toml").write_text("task = \n")
    missing = r"tiny-gpu: cannot read the recipe \(.*\); name a file, or one of .*tiny-cpu"
    for name, message in {"tiny-gpu": missing, "broken.toml": r"broken\.toml: not TOML"}.items():
        with pytest.raises(ConfigError, match=message):
            Recipe.load(name)
