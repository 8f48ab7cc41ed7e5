"""The paper's model. Law 12: the fast path equals the paper in loops on random small sizes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.family_table import ids, make_backbone
from tests.modeling.naive import NaiveLongMem

from longmem import AlibiGPTConfig, AlibiGPTForCausalLM, LongMem, MemoryBank
from longmem.modeling.alibi_gpt import alibi_slopes


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    heads=st.sampled_from([1, 2, 3, 4]),
    layers=st.integers(2, 5),
    chunk_size=st.integers(1, 4),
    num_chunks=st.integers(1, 5),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    final_state=st.sampled_from(["pre_norm", "normed"]),
    recency=st.sampled_from([0.0, 3.0]),
)
def test_fast_equals_naive(
    seed: int, heads: int, layers: int, chunk_size: int, num_chunks: int, lengths: list[int], final_state: str,
    recency: float,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    config = AlibiGPTConfig(vocab_size=23, hidden_size=4 * heads, num_hidden_layers=layers, num_attention_heads=heads)
    backbone = AlibiGPTForCausalLM(config)
    model = LongMem.from_backbone(
        backbone, chunk_size=chunk_size, num_retrieved=chunk_size * num_chunks, memory_size=64 * chunk_size,
        final_state=final_state, recency=recency,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
    bank = MemoryBank.for_model(model, rows=1)
    naive = NaiveLongMem(model)
    for number, length in enumerate(lengths):
        segment = torch.randint(0, 23, (length,))
        with torch.no_grad():
            out = model(segment[None], memory=bank)
            expected = naive.step(segment)
        torch.testing.assert_close(out.logits[0], expected, atol=2e-4, rtol=2e-4)
        # the oracle closes every segment's last chunk, as the end of a document does
        bank.add(out.kv, documents=[str(number)])
        bank.end_document()


def test_slopes_of_six_heads_are_those_of_four_and_two_in_between() -> None:
    expected = torch.tensor([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    torch.testing.assert_close(alibi_slopes(6), expected)


@torch.no_grad()
def test_eager_attention_equals_sdpa() -> None:
    model = make_backbone("alibi_gpt")
    fused = model(ids()).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(ids()).logits, fused, atol=1e-5, rtol=1e-5)
