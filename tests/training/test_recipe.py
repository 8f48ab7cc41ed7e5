"""Recipes: read from TOML, overridden, refused with every problem at once; their optimiser; what they will take."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longmem import AlibiGPTConfig, LongMem
from longmem.errors import ConfigError
from longmem.training.estimate import estimate
from longmem.training.models import build_optimiser, lr_share
from longmem.training.recipe import OptimSection, Recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SIDE = {"task": "adapt", "backbone": {"path": "x"}}


def problems(**sections: Any) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        Recipe.parse({"task": "pretrain", "data": {"paths": ["x"]}, "optim": {"steps": 1}, **sections})
    assert all("\n" not in line for line in raised.value.problems)
    return raised.value.problems


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
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


# schedules and optimisers


@pytest.mark.parametrize("schedule", ["polynomial", "cosine", "wsd"])
def test_rates_rise_to_their_peak_and_end_at_zero(schedule: str) -> None:
    optim = OptimSection(schedule=schedule, warmup=0.1)
    shares = [lr_share(optim, step / 1000) for step in range(1001)]
    assert shares[0] == 0 and shares[-1] == pytest.approx(0, abs=1e-12)
    assert shares.index(max(shares)) == 100 and max(shares) == pytest.approx(1)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(shares[100:]))


def test_a_step_is_that_of_torchs_own_two_optimisers() -> None:
    shapes = {"layers.0.w": (6, 4), "embedding": (8, 4), "norm": (4,), "sidenet.memory_gate": (2,)}
    start = {name: torch.randn(shape, generator=torch.manual_seed(0)) for name, shape in shapes.items()}
    mine, theirs = ({name: torch.nn.Parameter(w.clone()) for name, w in start.items()} for _ in range(2))
    optim = OptimSection(optimiser="muon", lr=1e-2, muon_lr=2e-2, gate_lr=3e-2, weight_decay=0.1)
    one = build_optimiser(mine.items(), optim)
    muon = torch.optim.Muon([theirs["layers.0.w"]], lr=2e-2, weight_decay=0.1)
    rest = [
        {"params": [theirs["embedding"]], "weight_decay": 0.1},
        {"params": [theirs["norm"]], "weight_decay": 0.0},
        {"params": [theirs["sidenet.memory_gate"]], "weight_decay": 0.0, "lr": 3e-2},
    ]
    adam = torch.optim.AdamW(rest, lr=1e-2, betas=optim.betas, eps=optim.eps)
    for _ in range(3):
        for some in (mine, theirs):
            for number, weight in enumerate(some.values()):
                weight.grad = torch.full_like(weight, 0.1 * (number + 1)) + weight.detach()
        for optimiser in (one, muon, adam):
            optimiser.step()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# the estimate: arithmetic behind the recipes' headers


def test_the_papers_model_is_counted_to_the_last_parameter_and_its_work_to_the_last_flop() -> None:
    found = estimate(Recipe.load(RECIPES / "paper-558m.toml"), "8x-a100-80gb", AlibiGPTConfig())
    assert (found.parameters, found.trained) == (407_072_768, 151_083_024)
    layer = 4 * 1024 * 1024 + (1024 * 4096 + 4096) + (4096 * 1024 + 1024) + 2 * 1024
    attention = projections = 4 * 1024 * 1024  # 4 x 1,024 tokens x 16 heads x 64
    assert found.flops == {
        "backbone": 24 * (2 * layer + attention) + 2 * projections,
        "trained layers": 3 * 12 * (2 * layer + attention),
        "head": 4 * 51200 * 1024,
        "search": 2 * 16384 * 16 * 64,
        "memory attention": 3 * 4 * 64 * 16 * 64 + 6 * projections,
    }
    # a row of memory: 65,536 tokens x 16 heads x 64 numbers x (key + value) x 2 bytes, and 16,384 float32 chunk keys
    assert found.bytes["bank"] == 8 * 320 * 2**20
    assert found.fits and found.hours == pytest.approx(16, rel=0.05)


def test_what_it_counts_is_what_a_model_has() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=50, num_hidden_layers=6, **shape)
    settings: dict[str, Any] = {"memory_layers": [1, 3], "init": "delta", "trained": "attention", "fusion": "token"}
    model = LongMem.from_backbone(LlamaForCausalLM(config), **settings)
    optim = {"steps": 10, "precision": "fp32"}
    recipe = {"task": "adapt", "data": {"paths": ["x"]}, "backbone": {"path": "x"}, "sidenet": settings, "optim": optim}
    found = estimate(Recipe.parse(recipe), "2-cpu-cores", config)
    assert found.parameters == sum(p.numel() for p in model.backbone.model.parameters())
    assert found.trained == sum(p.numel() for p in model.trainable_parameters())


def test_a_recipe_that_does_not_fit_says_so_and_quantised_it_may() -> None:
    config = LlamaConfig(num_key_value_heads=8, vocab_size=128256, intermediate_size=14336)
    recipe = Recipe.load(RECIPES / "llama-class.toml")
    small, large = (estimate(recipe, name, config) for name in ("rtx-4090", "h100-80gb"))
    assert not small.fits and "DOES NOT FIT" in "\n".join(small.lines())
    quantised = Recipe.load(RECIPES / "llama-class.toml", ["backbone.quantised=4bit"])
    assert large.fits and estimate(quantised, "h100-80gb", config).gib < large.gib - 8


@pytest.mark.parametrize(
    ("recipe", "machine", "message"),
    [
        ("small-backbone", "tpu", r"hardware \('tpu'\) is not known; try one of 2-cpu-cores, "),
        ("small-backbone", "a100-80gb", r"optim\.tokens and optim\.steps are both missing"),
        ("gpt2-small", "a100-80gb", r"an estimate needs its config\.json"),
    ],
)
def test_an_estimate_needs_a_known_machine_a_budget_and_a_config(
    recipe: str, machine: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        estimate(Recipe.load(RECIPES / f"{recipe}.toml", [f"backbone.path={tmp_path}"]), machine)
