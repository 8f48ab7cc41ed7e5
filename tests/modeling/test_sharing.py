"""One model for several threads, and several copies of one model."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tests.family_table import SETTINGS, filled, ids, make_backbone

from longmem import LongMem, MemTRM, TrainingFree

MODELS = [(LongMem, "softmax"), (TrainingFree, "gate"), (MemTRM, "gate")]


def made(kind: Any, fusion: str) -> Any:
    model = kind.from_backbone(make_backbone("llama"), fusion=fusion, **SETTINGS).eval()
    with torch.no_grad():
        model.memory_gate.fill_(2.0)
    return model


@pytest.mark.parametrize(("kind", "fusion"), MODELS)
def test_threads_that_share_a_model_never_read_each_others_memory_or_window(kind: Any, fusion: str) -> None:
    model, segment = made(kind, fusion), ids(1, 16, seed=99)
    banks: dict[Any, Any] = {None: None} | {seed: filled(model, ids(1, 64, seed)) for seed in range(3)}
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"window": 12, "window_move": 6, "output_logits": True, "return_dict_in_generate": True}

    @torch.no_grad()
    def logits(tenant: int | None) -> Any:
        return model(segment, memory=banks[tenant]).logits

    def continued(tenant: int | None) -> Any:
        return model.generate(segment, memory=banks[tenant], **settings).logits[-1]

    for ask in (logits, continued):
        alone = {tenant: ask(tenant) for tenant in banks}
        assert len({tuple(each.flatten().tolist()) for each in alone.values()}) == len(banks)
        with ThreadPoolExecutor(4) as pool:
            asked = [(tenant, pool.submit(ask, tenant)) for _ in range(8) for tenant in banks]
            for tenant, answer in asked:
                torch.testing.assert_close(answer.result(), alone[tenant], atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("kind", "fusion"), MODELS)
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_answers_alike_and_is_its_own(way: Callable[[Any], Any], kind: Any, fusion: str, used: bool) -> None:
    model, segment = made(kind, fusion), ids(1, 16, seed=99)
    bank = filled(model, ids(1, 64, 0)) if used else None  # a model that has run holds more than one that has not
    other = way(model)
    bank = filled(model, ids(1, 64, 0)) if bank is None else bank
    expected = model(segment, memory=bank).logits
    assert torch.equal(other(segment, memory=bank).logits, expected)
    other.memory_gate.fill_(-3.0)
    assert torch.equal(model(segment, memory=bank).logits, expected)
    assert not torch.equal(other(segment, memory=bank).logits, expected)


@torch.no_grad()
def test_the_users_own_backbone_stays_free_of_us() -> None:
    backbone = make_backbone("llama")
    model = LongMem.from_backbone(backbone, fusion="softmax", **SETTINGS).eval()
    model(ids(1, 16), memory=filled(model, ids(1, 64, 0)))
    parts = list(backbone.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    assert copy.deepcopy(backbone).config._attn_implementation == backbone.config._attn_implementation
    pickle.dumps(backbone)


@torch.no_grad()
@pytest.mark.parametrize("kind", [LongMem, TrainingFree])
def test_hidden_states_and_attentions_come_back(kind: Any) -> None:
    backbone = make_backbone("llama")
    backbone.set_attn_implementation("eager")
    model = kind.from_backbone(backbone, **SETTINGS).eval()
    asked: dict[str, Any] = {"output_hidden_states": True, "output_attentions": True}
    expected, found = backbone(ids(1, 8), **asked), model(ids(1, 8), **asked)
    for name in ("hidden_states", "attentions"):
        assert len(getattr(found, name)) == len(getattr(expected, name))
        assert all(torch.equal(a, b) for a, b in zip(getattr(found, name), getattr(expected, name), strict=True))
    asked |= {"return_dict_in_generate": True, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids(1, 8), max_new_tokens=2, do_sample=False, **asked)
    assert len(out.hidden_states) == 2 and len(out.attentions[0]) == 4
