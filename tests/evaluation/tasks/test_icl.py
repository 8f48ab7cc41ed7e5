"""In-context learning: scores worked by hand, demonstrations, memory that is read, and what the result says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from longmem import AlibiGPTForCausalLM, LongMem, MemoryBank
from longmem.errors import ConfigError, DataError
from longmem.evaluation.asking import Asker, Choice, Scored, askers
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.runner import TaskResult, run_task
from longmem.evaluation.systems import Comparison
from longmem.evaluation.tasks.icl import IclSettings, IclTask, calibrated, chosen_texts, judged, starts_label
from longmem.evaluation.tasks.icl_data import KINDS, IclSet, Labelled
from longmem.evaluation.tasks.icl_summary import shots_seen, summarise

WINDOW = 160
SETTINGS = IclSettings(local_shots=(1, 8), memory_shots=(0, 12), seeds=2, limit=3)


def made(name: str, texts: int = 40) -> IclSet:
    words = ("old", "new", "dull", "fine", "long")
    labels = len(KINDS[name].labels)
    made = [Labelled(f"{words[n % 5]} film {name} {n}", n * 7 % labels) for n in range(texts)]
    return IclSet(name, KINDS[name], tuple(made[10:]), tuple(made[:10]), {"files": [name]})


@pytest.fixture(scope="module")
def sets() -> list[IclSet]:
    return [made("sst2"), made("sst5")]


@pytest.fixture
def model(tiny_backbone: AlibiGPTForCausalLM) -> LongMem:
    torch.manual_seed(1)
    model = LongMem.from_backbone(tiny_backbone, chunk_size=4, num_retrieved=16, memory_size=2048).eval()
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


@dataclasses.dataclass(frozen=True)
class Recording(Asker):
    """A system that keeps what it is asked and what it answers."""

    asked: list[tuple[Choice, Any, Scored]] = dataclasses.field(default_factory=list)
    read: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def score(self, questions: Sequence[Choice], bank: Any = None) -> Iterator[tuple[int, Scored]]:
        for number, scored in super().score(questions, bank):
            self.asked.append((questions[number], bank, scored))
            yield number, scored

    def remember(self, memory: tuple[int, ...]) -> MemoryBank:
        self.read.append(memory)
        return super().remember(memory)


def systems(model: LongMem, tokenizer: Any, *, full: int | None = None) -> dict[str, Recording]:
    comparison = Comparison.of_longmem(model, [512])
    found = askers(comparison, tokenizer, window=WINDOW, rows=16, full_context=full)
    fields = [field.name for field in dataclasses.fields(Asker)]
    return {asker.name: Recording(**{name: getattr(asker, name) for name in fields}) for asker in found}


def result_of(task: IclTask, asked: dict[str, Recording]) -> TaskResult:
    return run_task(task, list(asked.values()), bootstrap=Bootstrap(resamples=50), seeds=list(task.seeds))


@pytest.mark.parametrize(
    ("first", "label", "right"),
    [
        (" positive", "positive", True),
        (" pos", "positive", True),
        ("p", "positive", True),
        ("", "positive", False),
        (" ", "positive", False),  # empty once stripped, though every text begins with nothing
        (" Positive", "positive", False),
        ("positively", "positive", False),
        (" neg", "positive", False),
    ],
)
def test_the_first_token_must_be_a_prefix_of_the_label(first: str, label: str, right: bool) -> None:
    assert starts_label(first, label) is right


def test_calibration_divides_by_what_labels_get_for_nothing() -> None:
    # shares of two labels where there is nothing to judge: 0.8 to 0.2 and 0.6 to 0.4, on average 0.7 to 0.3
    free = [[math.log(0.08), math.log(0.02)], [math.log(0.3), math.log(0.2)]]
    found = calibrated([math.log(0.6), math.log(0.3)], free)
    assert [math.exp(value) for value in found] == pytest.approx([0.6 / 0.7, 0.3 / 0.3])
    assert calibrated([-1.0, -2.0], [[0.0, -2000.0]])[1] == pytest.approx(-2 - math.log(1e-300))


def test_an_answer_is_judged_in_three_ways() -> None:
    free = [Scored((math.log(0.9), math.log(0.1)), (False, False), 0)]
    scored = Scored((math.log(0.2), math.log(0.1)), (False, False), 0)
    assert judged(scored, free, 0, first=False) == {"first_token": 0, "likelihood": 100, "calibrated": 0}
    assert judged(scored, free, 1, first=True) == {"first_token": 100, "likelihood": 0, "calibrated": 100}


def test_templates_are_the_papers(byte_tokenizer: Any) -> None:
    task = IclTask([made("sst5"), made("subj")], byte_tokenizer, SETTINGS)

    def text(ids: Sequence[int]) -> str:
        return str(byte_tokenizer.decode(ids))

    sst5, subj = task.prompts["sst5"], task.prompts["subj"]
    assert text(sst5.queries[0]) == " Review: old film sst5 0 Sentiment:"
    assert text(sst5.demonstrations[0]) == " Review: old film sst5 10 Sentiment: terrible."
    assert [text(option) for option in sst5.options] == [" terrible", " bad", " okay", " good", " great"]
    assert text(subj.demonstrations[1]) == " Input: new film subj 11 Type: objective."
    assert [text(query) for query in subj.content_free] == [f" Input: {x} Type:" for x in ("N/A", "[MASK]", "")]


def test_demonstrations_of_memory_are_neither_those_of_the_window_nor_tested(
    sets: list[IclSet], byte_tokenizer: Any
) -> None:
    task = IclTask(sets, byte_tokenizer, SETTINGS)
    for name, prompts in task.prompts.items():
        for seed in task.seeds:
            shots = task.shots(name, seed, 8, 12)
            shown = [*shots.local, *shots.memory]
            assert len(set(shown)) == 20
            assert not {text[:-4] for text in shown} & {query[:-4] for query in prompts.queries}
        assert task.shots(name, 1, 8, 12).local != task.shots(name, 2, 8, 12).local
        assert task.shots(name, 1, 8, 12).local[-1:] == task.shots(name, 1, 1, 12).local


def test_more_demonstrations_than_there_are_is_an_error(sets: list[IclSet], byte_tokenizer: Any) -> None:
    task = IclTask(sets, byte_tokenizer, IclSettings(local_shots=(4,), memory_shots=(2000,)))
    with pytest.raises(DataError, match=r"sst2: 4 demonstrations .* there are 30; ask for fewer"):
        task.examples()


def test_settings_that_break_a_rule_are_listed_together() -> None:
    with pytest.raises(ConfigError, match=r"local_shots \(4,4\).*memory_shots \(-1\).*seeds \(0\)"):
        IclSettings(local_shots=(4, 4), memory_shots=(-1,), seeds=0)


def test_test_texts_are_drawn_once(sets: list[IclSet]) -> None:
    assert chosen_texts(sets[0], None) == chosen_texts(sets[0], 10) == list(range(10))
    few = chosen_texts(sets[0], 3)
    assert few == chosen_texts(sets[0], 3) == sorted(set(few)) and len(few) == 3


def test_likelihoods_are_those_of_a_memory_read_by_hand(
    sets: list[IclSet], model: LongMem, byte_tokenizer: Any
) -> None:
    task = IclTask(sets[:1], byte_tokenizer, IclSettings((2,), (12,), seeds=1, limit=2))
    asker = systems(model, byte_tokenizer)["memory_512"]
    examples = task.examples()
    found = dict(task.answer(asker, examples))
    shots, prompts = task.shots("sst2", 1, 2, 12), task.prompts["sst2"]
    bank = MemoryBank.for_model(model, 1, 512)
    told = [token for text in shots.memory for token in text]
    for start in range(0, len(told), WINDOW):
        bank.add(model.encode(torch.tensor([told[start : start + WINDOW]])))
    bank.end_document()
    for number, example in enumerate(examples):
        likelihoods = []
        for option in prompts.options:
            context = [*shots.local[0], *shots.local[1], *prompts.queries[example.text]]
            with torch.no_grad():
                logits = model(torch.tensor([[*context, *option[:-1]]]), memory=bank).logits[0, len(context) - 1 :]
            likelihoods.append(logits.log_softmax(-1).gather(1, torch.tensor(option)[:, None]).sum().item())
        (scored,) = [s for q, _, s in asker.asked if list(q.context) == context]
        assert scored.logprobs == pytest.approx(likelihoods, abs=1e-3)
        right = likelihoods.index(max(likelihoods)) == prompts.data.test[example.text].label
        assert found[number]["likelihood"] == 100 * right


def test_memory_is_read_once_and_what_it_does_not_change_is_asked_once(
    sets: list[IclSet], model: LongMem, byte_tokenizer: Any
) -> None:
    task = IclTask(sets, byte_tokenizer, SETTINGS)
    asked = systems(model, byte_tokenizer, full=220)
    examples = task.examples()
    found = {name: dict(task.answer(asker, examples)) for name, asker in asked.items()}
    assert len(asked["memory_512"].read) == len(set(asked["memory_512"].read)) == 2 * 2  # sets, seeds
    assert not asked["memory_off"].read and not asked["full_220"].read
    assert all(bank is not None for _, bank, _ in asked["memory_512"].asked)  # with an empty one it is memory off
    assert len(asked["backbone"].asked) == len({tuple(q.context) for q, _, _ in asked["backbone"].asked})
    for number, example in enumerate(examples):
        without = next(
            at
            for at, other in enumerate(examples)
            if (other.unit, other.seed, other.local, other.memory) == (example.unit, example.seed, example.local, 0)
        )
        assert found["memory_off"][number] == found["memory_off"][without]
        if example.memory == 0:
            assert found["memory_512"][number] == found["memory_off"][number]
    # with demonstrations in memory, likelihoods change; a longer window holds them itself
    mine = {tuple(q.context): s for q, bank, s in asked["memory_512"].asked if bank is not None}
    off = {tuple(q.context): s for q, _, s in asked["memory_off"].asked}
    assert mine.keys() <= off.keys() and all(mine[context] != off[context] for context in mine)
    assert max(len(q.context) for q, _, _ in asked["full_220"].asked) > WINDOW


@dataclasses.dataclass(frozen=True)
class Forgetful(Recording):
    """A system whose memory is lost before it is read, as the released script's can be."""

    def _read(self, texts: Any) -> Any:
        found = super()._read(texts)
        if found is not None:
            assert isinstance(found.bank, MemoryBank)
            found.bank.reset()
        return found


def test_no_memory_result_comes_from_an_empty_memory(sets: list[IclSet], model: LongMem, byte_tokenizer: Any) -> None:
    task = IclTask(sets, byte_tokenizer, SETTINGS)
    asker = Forgetful(**vars(systems(model, byte_tokenizer)["memory_512"]))
    examples = task.examples()
    without = [example for example in examples if not example.memory]
    assert len(list(task.answer(asker, without))) == len(without)
    with pytest.raises(ConfigError, match=r"^memory_512: its memory holds nothing after reading [\d,]+ tokens") as told:
        list(task.answer(asker, examples))
    assert "\n" not in str(told.value)


def test_the_result_has_averages_seeds_and_how_many_demonstrations_fitted(
    sets: list[IclSet], model: LongMem, byte_tokenizer: Any
) -> None:
    task = IclTask(sets, byte_tokenizer, SETTINGS)
    asked = systems(model, byte_tokenizer)
    plain = result_of(task, asked)
    result = summarise(plain, task, list(asked.values()), Bootstrap(resamples=50))
    groups = {group.group: group for group in result.groups}
    assert list(groups)[:2] == ["all", "sst2, 1 + 0"] and list(groups)[-1] == "average, 8 + 12"
    assert groups["sst2, 1 + 0"].examples == 6 and groups["sst2, 1 + 0"].units == 3
    for name in result.systems:
        for metric in result.metrics:
            each = [groups[f"{data}, 8 + 12"].score(name, metric.name).value for data in ("sst2", "sst5")]
            over = groups["average, 8 + 12"].score(name, metric.name)
            assert over.value == pytest.approx(sum(each) / 2) and over.interval is not None
            spread = result.extra["per_seed"]["average, 8 + 12"][name][metric.name]
            assert spread["mean"] == pytest.approx(over.value, abs=1e-2) and len(spread["values"]) == 2
            assert spread["std"] == pytest.approx(abs(spread["values"][0] - spread["values"][1]) / 2, abs=1e-2)
    gaps = {(d.system, d.against): d.value for d in groups["average, 8 + 12"].differences if d.metric == "likelihood"}
    assert gaps["memory_512", "memory_off"] == pytest.approx(
        groups["average, 8 + 12"].score("memory_512", "likelihood").value
        - groups["average, 8 + 12"].score("memory_off", "likelihood").value
    )
    # a demonstration has 46 to 48 bytes: ten or eleven of twelve fit a memory of 512, twelve and eight fit 1,024
    shots = result.extra["shots"]["sst2, 8 + 12"]
    assert shots["backbone"]["window"] == shots["memory_512"]["window"] < 8
    assert shots["backbone"]["memory"] == 0 and 10 <= shots["memory_512"]["memory"] <= 11
    full = [systems(model, byte_tokenizer, full=1024)["full_1024"]]
    assert shots_seen(task, full)["sst2, 8 + 12"] == {"full_1024": {"window": 8, "memory": 12}}
    assert result.extra["sets"]["sst5"]["chance"] == 20
    assert len(result.examples) * 2 == len(plain.examples)
    one = result.examples[0]
    same = [e.values for e in plain.examples if (e.unit, e.group) == (one.unit, one.group)]
    assert len(same) == 2
    assert one.values["backbone"]["likelihood"] == sum(v["backbone"]["likelihood"] for v in same) / 2
