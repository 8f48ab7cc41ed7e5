"""The whole measurement on tiny random models."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, CheckpointError, ConfigError, LongMem, MemoryBank
from longmem.data.text import Document
from longmem.data.tokenizer import train_tokenizer
from longmem.evaluation.bootstrap import Bootstrap
from longmem.evaluation.documents import TokenizedDocument, tokenize_documents
from longmem.evaluation.perplexity import PerplexitySettings, perplexity
from longmem.evaluation.plots import plot_all
from longmem.evaluation.results import to_json
from longmem.evaluation.systems import Comparison
from longmem.progress import Progress

TEXT = "Words of a small text, and more words of it; then the same words again. "
TOKENIZER = train_tokenizer([TEXT], 290)
SETTINGS = PerplexitySettings(window=16, rows=2, block=32, bootstrap=Bootstrap(resamples=50))


def backbone(seed: int = 0) -> AlibiGPTForCausalLM:
    torch.manual_seed(seed)
    config = AlibiGPTConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return AlibiGPTForCausalLM(config).eval()


def longmem(seed: int = 1, **config: Any) -> LongMem:
    model = LongMem.from_backbone(backbone(), chunk_size=2, num_retrieved=8, memory_size=64, **config).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.trainable_parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def texts(*repeats: int) -> list[Document]:
    return [Document(f"test/{'ab'[i % 2]}__{i}.txt", f"{i} " + TEXT * n, "") for i, n in enumerate(repeats)]


def documents(*repeats: int) -> list[TokenizedDocument]:
    return tokenize_documents(texts(*repeats), TOKENIZER, group_separator="__")


def nll_of(found: Any, system: str, protocol: str) -> list[float]:
    return [document.nll[protocol][system] for document in found.documents]


def stopped_at(what: str, share: float) -> Callable[..., None]:
    """``Progress.advance`` of a run that is interrupted after a share of this work."""

    def advance(progress: Progress, amount: int = 1, note: str = "") -> None:
        progress.done += amount
        if progress.what == what and progress.total and progress.done > share * progress.total:
            raise KeyboardInterrupt

    return advance


def test_a_model_without_preference_has_the_perplexity_of_its_vocabulary() -> None:
    model = backbone()
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    found = perplexity(Comparison.of_backbone(model), documents(3, 2), SETTINGS)
    for scores in found.protocols.values():
        assert scores.all.system("backbone").perplexity == pytest.approx(len(TOKENIZER), rel=1e-5)


def test_systems_run_together_score_as_the_models_alone() -> None:
    """One pass of the backbone for all gives what each model's own forward gives, window by window."""
    model, control = longmem(1), longmem(2)
    (document,) = documents(3)
    comparison = Comparison.of_longmem(model, [8, 64], control=control)
    found = perplexity(comparison, [document], SETTINGS)
    ids = document.ids
    for protocol, stride in (("segments", 16), ("sliding", 8)):
        banks = {f"memory_{size}": MemoryBank.for_model(model, rows=1, capacity_tokens=size) for size in (8, 64)}
        expected = dict.fromkeys(found.systems, 0.0)
        held: list[Tensor] = []
        start, scored = 0, 0
        while scored < len(ids) - 1:
            end = min(start + 16, len(ids) - 1)
            window, targets = ids[None, start:end], ids[scored + 1 : end + 1]
            with torch.no_grad():
                logits = {"backbone": model.backbone.model(window).logits, "memory_off": model(window).logits}
                logits["control"] = control(window).logits
                for name, bank in banks.items():
                    out = model(window, memory=bank)
                    logits[name] = out.logits
            for name, values in logits.items():
                each = values[0, scored - start :].log_softmax(-1).gather(1, targets[:, None])
                expected[name] -= each.sum().item()
            held.append(torch.stack([out.kv.keys, out.kv.values])[:, :, :, scored - start :])
            seen = torch.cat(held, dim=3)
            start, scored = start + stride, end
            for bank in banks.values():
                bank.reset()
                bank.add(type(out.kv)(*seen[:, :, :, :start]))
        for name, value in expected.items():
            assert nll_of(found, name, protocol) == pytest.approx([value], rel=1e-5), (protocol, name)


@pytest.mark.parametrize("fusion", ["gate", "softmax"])
def test_rows_of_a_batch_score_as_alone(fusion: str) -> None:
    """Law 4, with rows that begin and end at different times and banks that overflow."""
    model, several = longmem(fusion=fusion), documents(5, 1, 3, 2, 4)
    together = perplexity(Comparison.of_longmem(model, [16, 64]), several, SETTINGS)
    for i, document in enumerate(several):
        alone = perplexity(Comparison.of_longmem(model, [16, 64]), [document], SETTINGS)
        for protocol in together.protocols:
            for system in together.systems:
                assert nll_of(together, system, protocol)[i] == pytest.approx(
                    nll_of(alone, system, protocol)[0], rel=1e-5
                )


def test_memory_never_holds_a_token_that_is_still_in_the_window() -> None:
    """Seen from inside: at every search, each row holds exactly the chunks that lie before its window."""
    model, several = longmem(), documents(3, 2, 1)
    looks: list[tuple[int, int]] = []

    class WatchedBank(MemoryBank):
        def search(self, queries: Tensor, num_chunks: int, rows: Tensor | None = None) -> Any:
            assert rows is not None
            for row in rows.tolist():
                assert self.tokens[row] == seen[row] - seen[row] % 2
                looks.append((row, seen[row]))
            return super().search(queries, num_chunks, rows)

        def add(self, kv: Any, **where: Any) -> None:
            super().add(kv, **where)
            for row, offset in zip(where["rows"].tolist(), where["offsets"], strict=True):
                assert offset == seen[row]
                seen[row] += kv.keys.shape[2]
                assert seen[row] % 8 == 0, "the window moves by its stride, and memory with it"

        def reset(self, rows: Tensor | None = None) -> None:
            super().reset(rows)
            for row in range(2) if rows is None else rows.tolist():
                seen[row] = 0

    seen = [0, 0]
    comparison = Comparison.of_longmem(
        model, [512], make_memory=lambda m, rows, size: WatchedBank.for_model(m, rows=rows, capacity_tokens=size)
    )
    perplexity(comparison, several, PerplexitySettings(window=16, rows=2, protocols=("sliding",)))
    assert max(held for _, held in looks) >= 40


def test_a_document_within_the_window_gains_nothing_from_memory_and_protocols_agree() -> None:
    (document,) = tokenize_documents([Document("a", TEXT, "")], TOKENIZER, max_tokens=17)
    found = perplexity(Comparison.of_longmem(longmem(), [64]), [document], SETTINGS)
    for system in found.systems:
        assert nll_of(found, system, "segments") == nll_of(found, system, "sliding")
    assert nll_of(found, "memory_64", "segments") == nll_of(found, "memory_off", "segments")


def test_identity_sidenet_has_its_backbones_perplexity_and_an_interval_around_zero() -> None:
    model = LongMem.from_backbone(backbone(), chunk_size=2, num_retrieved=8, memory_size=64, init="zero").eval()
    if model.config.final_state == "normed":
        pytest.skip("only the residuals of the pre-norm state telescope")
    found = perplexity(Comparison.of_longmem(model, [64]), documents(4, 3, 2), SETTINGS)
    for scores in found.protocols.values():
        difference = scores.all.difference("memory_off", "backbone")
        assert difference is not None
        assert difference.documents is not None
        assert difference.percent == pytest.approx(0, abs=1e-3)
        assert difference.documents.low == pytest.approx(0, abs=1e-3)


def test_systems_may_run_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, several = longmem(), documents(3, 2)
    expected = perplexity(Comparison.of_longmem(model, [16, 64]), several, SETTINGS)
    monkeypatch.setattr("longmem.evaluation.systems.LOGITS_BYTES", 1)
    found = perplexity(Comparison.of_longmem(model, [16, 64]), several, SETTINGS)
    for protocol in expected.protocols:
        for system in expected.systems:
            np.testing.assert_allclose(nll_of(found, system, protocol), nll_of(expected, system, protocol), rtol=1e-5)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, several = longmem(), documents(4, 2, 3)
    comparison = Comparison.of_longmem(model, [64])
    whole = perplexity(comparison, several, SETTINGS)
    path = tmp_path / "records.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Progress, "advance", stopped_at("perplexity, sliding", 0.9))
        with pytest.raises(KeyboardInterrupt):
            perplexity(comparison, several, SETTINGS, records=path)
    kept = len([line for line in path.read_text().splitlines() if line])
    assert 9 < kept < 18, "all of the first protocol, and what was finished of the second"
    found = perplexity(comparison, several, SETTINGS, records=path)
    for system in whole.systems:
        assert nll_of(found, system, "sliding") == pytest.approx(nll_of(whole, system, "sliding"), rel=1e-5)
    written = path.read_text()
    again = perplexity(comparison, several, SETTINGS, records=path)
    assert path.read_text() == written, "nothing is measured twice"
    assert again.header.seconds == found.header.seconds > 0, "the time of all runs together"


def test_records_of_other_settings_or_weights_are_not_reused(tmp_path: Path) -> None:
    several, path = documents(2, 1), tmp_path / "records.jsonl"
    perplexity(Comparison.of_longmem(longmem(1), [64]), several, SETTINGS, records=path)

    def scored_anew(model: LongMem, sizes: Sequence[int], settings: PerplexitySettings) -> set[str]:
        before = len(path.read_text().splitlines())
        perplexity(Comparison.of_longmem(model, sizes), several, settings, records=path)
        return {json.loads(line)["system"] for line in path.read_text().splitlines()[before:] if line}

    assert scored_anew(longmem(1), [64], SETTINGS) == set()
    assert scored_anew(longmem(1), [16, 64], SETTINGS) == {"memory_16"}
    assert scored_anew(longmem(2), [64], SETTINGS) == {"memory_off", "memory_64"}
    other = PerplexitySettings(window=12, rows=2, block=32, bootstrap=SETTINGS.bootstrap)
    assert scored_anew(longmem(1), [64], other) == {"backbone", "memory_off", "memory_64"}


def test_result_has_groups_baselines_and_all_that_repeats_it(tmp_path: Path) -> None:
    comparison = Comparison.of_longmem(longmem(1), [16, 64], control=longmem(2))
    found = perplexity(comparison, documents(4, 3, 2), SETTINGS, command="longmem eval", config={"data": ["x"]})
    plain = json.loads(to_json(found))
    assert set(plain["protocols"]) == {"segments", "sliding"}
    assert [group["name"] for group in plain["protocols"]["sliding"]["groups"]] == ["a", "b"]
    pairs = {(d["system"], d["against"]) for d in plain["protocols"]["sliding"]["all"]["differences"]}
    assert {("memory_64", "backbone"), ("memory_64", "memory_off"), ("memory_64", "control")} <= pairs
    assert plain["header"]["config"]["data"] == ["x"]
    assert plain["header"]["samples"]["documents"] == 3
    assert plain["header"]["models"]["memory_64"]["side"] != plain["header"]["models"]["control"]["side"]
    total = sum(d["nll"]["sliding"]["memory_64"] for d in plain["documents"])
    system = next(s for s in plain["protocols"]["sliding"]["all"]["systems"] if s["system"] == "memory_64")
    assert system["perplexity"] == pytest.approx(math.exp(total / plain["header"]["samples"]["tokens"]))
    files = plot_all(found, tmp_path)
    assert [file.name for file in files] == ["perplexity-by-position.png", "perplexity-by-memory-size.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)


def test_a_control_over_another_backbone_is_refused() -> None:
    other = LongMem.from_backbone(backbone(seed=7), chunk_size=2, num_retrieved=8, memory_size=64)
    with pytest.raises(
        CheckpointError, match=r"control's backbone \(\w+\) is not the model's \(\w+\); compare SideNets"
    ):
        Comparison.of_longmem(longmem(), [64], control=other)


def test_all_broken_settings_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        PerplexitySettings(window=16, stride=17, protocols=("segments", "rolling"), rows=0)
    assert caught.value.problems == [
        "rows (0) must be at least 1",
        "stride (17) must be between 1 and the window (16); try 8",
        "protocols (rolling) must be among segments, sliding",
    ]


def tiny(family: str) -> Any:
    from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig

    torch.manual_seed(0)
    shape = {"vocab_size": len(TOKENIZER), "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    rotary = {**shape, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
    config: Any = {
        "gpt2": lambda: GPT2Config(vocab_size=len(TOKENIZER), n_embd=32, n_layer=4, n_head=4, n_positions=16),
        "llama": lambda: LlamaConfig(**rotary),
        "gemma2": lambda: Gemma2Config(**rotary, sliding_window=8, final_logit_softcapping=3.0),
        "opt": lambda: OPTConfig(**shape, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=16),
    }[family]()
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_one_backbone_pass_serves_all_systems_in_every_family(family: str) -> None:
    model = LongMem.from_backbone(tiny(family), chunk_size=2, num_retrieved=4, memory_size=32).eval()
    comparison = Comparison.of_longmem(model, [32])
    subject = comparison.prepare(comparison.systems, 2, 100)
    ids = torch.randint(len(TOKENIZER), (2, 16))
    with torch.no_grad():
        written = model(ids).kv
        bank = MemoryBank.for_model(model, rows=2, capacity_tokens=32)
        for memory in (bank, *subject.memories):
            memory.add(written)
        together, kv = subject.forward(ids, torch.tensor([0, 1]), 5)
        alone = [model.backbone.model(ids).logits, model(ids).logits, model(ids, memory=bank).logits]
    assert kv is not None
    torch.testing.assert_close(kv.keys, written.keys)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other[:, -5:], rtol=1e-4, atol=1e-5)
