"""What was read of memory, led back to documents, and what it did to each token: the numbers, and the page of them."""

import json
import re

import pytest
import torch
from tests.generation.models import bank_of, ids, longmem
from transformers import PreTrainedTokenizerFast

from longmem import LongMem, MemoryBank, SessionMemory
from longmem.generation.page import Explanation, Readings, generate_explained, page, read_tokens
from longmem.types import ChunkOrigin

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EVIL = "</script><script>alert(1)</script><!-- \u2028"


@pytest.fixture(scope="module")
def llama() -> LongMem:
    return longmem("llama")


def letters(model: LongMem) -> MemoryBank:
    bank = MemoryBank.for_model(model, rows=2, capacity_tokens=64)
    bank.add(model.encode(ids(2, 15, seed=3)), documents=["letter 0", "letter 1"])
    bank.end_document()
    return bank


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["gate", "softmax"])
@pytest.mark.parametrize(
    ("name", "scaling", "softcap"),
    [("llama", 8**-0.5, None), ("gemma2", 16**-0.5, 50.0), ("gpt2", 8**-0.5, None), ("alibi_gpt", 8**-0.5, None)],
)
def test_shares_are_gate_times_attention_mass(name: str, scaling: float, softcap: float | None, fusion: str) -> None:
    model = longmem(name, fusion=fusion)
    out = model(ids(), memory=letters(model), explain=True)
    found = out.reads[0].retrieved
    scores = torch.einsum("bhtd,bhtkd->bhtk", out.reads[0].queries, found.keys) * scaling
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    mass = scores.masked_fill(~found.mask, -torch.inf).softmax(-1).unflatten(-1, (-1, 2)).sum(-1)
    torch.testing.assert_close(out.explanation.shares, mass * out.share[..., None])
    torch.testing.assert_close(out.explanation.share, out.share)
    assert torch.equal(out.explanation.chunks, found.chunks)
    assert torch.equal(out.explanation.scores, found.scores)


def test_every_chunk_found_is_led_back_to_its_document_also_when_memory_is_written_meanwhile() -> None:
    model = longmem()
    bank = letters(model)
    out = model(ids(), memory=bank, explain=True)
    assert torch.equal(out.logits, model(ids(), memory=bank).logits)
    assert model(ids(), memory=bank).explanation is None
    for row in range(2):
        one = model(ids(1), memory=bank, memory_rows=torch.tensor([row]), explain=True).explanation
        for reading in [*out.explanation.over(row=row), *one.over()]:
            assert reading.origin == bank.provenance(row, reading.chunk)
            length = 1 if reading.chunk == 7 else 2
            where = (reading.origin.document, reading.origin.start_token, reading.origin.length)
            assert where == (f"letter {row}", 2 * reading.chunk, length)
    before = out.explanation.token(0)
    bank.reset()
    assert out.explanation.token(0) == before  # it outlives the memory
    empty = model(ids(), memory=bank, explain=True).explanation
    assert empty.token(4) == [] and (empty.shares == 0).all() and (empty.chunks == -1).all()


@torch.no_grad()
def test_the_gain_is_against_the_same_model_and_window_with_memory_off(llama: LongMem) -> None:
    session = SessionMemory.for_model(llama, bank_of(llama))
    settings = {"window": 12, "window_move": 6, "max_new_tokens": 17, **GREEDY}
    whole, gains, readings = generate_explained(llama, ids(1, 9), session, **settings)
    out = llama.generate(ids(1, 9), memory=bank_of(llama), output_logits=True, return_dict_in_generate=True, **settings)
    assert torch.equal(whole, out.sequences[0])
    text, start, off = whole.tolist(), 0, []
    for place in range(9, 26):
        while place - start > 12:
            start += 6
        off.append(float(llama(whole[None, start:place]).logits[0, -1].log_softmax(-1)[text[place]]))
    on = [float(step[0].log_softmax(-1)[token]) for step, token in zip(out.logits, text[9:], strict=True)]
    assert (
        gains == pytest.approx([a - b for a, b in zip(on, off, strict=True)], abs=1e-4) and max(map(abs, gains)) > 0.1
    )
    assert all(0 < sum(chunk.share for chunk in each.chunks) <= each.share + 1e-6 for each in readings)
    documents = [{chunk.origin.document for chunk in each.chunks} for each in readings]
    assert documents[0] == {"before"} and "(this text)" in documents[-1]


def test_every_layer_says_what_it_read() -> None:
    """Two layers of one head, over row 3 of a memory; the token reads chunk 0 in both and chunk 1 in the second."""
    found = torch.tensor([[0, -1], [1, 0]]).view(1, 2, 1, 2)
    shares = torch.tensor([[0.2, 0.0], [0.4, 0.1]]).view(1, 2, 1, 2)
    origins = {(3, chunk): ChunkOrigin("book", chunk * 2, 2, chunk, 0.0) for chunk in range(2)}
    explanation = Explanation(torch.tensor([3]), found, 10 * shares, shares, origins, layers=(5, 9))
    assert [(each.score, each.origin.start_token) for each in explanation.token(0)] == [(4.0, 2), (2.0, 0)]
    assert explanation.token(-1, top=1) == explanation.token(0)[:1]
    readings = Readings()
    readings.append(explanation)
    (read,) = readings
    assert explanation.over([]) == []
    assert read.layers == pytest.approx({5: 0.2, 9: 0.5}) and read.share == pytest.approx(0.35)
    assert [(each.chunk, each.share, each.layers) for each in read.chunks] == [
        (1, pytest.approx(0.2), pytest.approx({9: 0.4})),
        (0, pytest.approx(0.15), pytest.approx({5: 0.2, 9: 0.1})),
    ]


def test_the_page_stands_alone_and_holds_texts_as_text(llama: LongMem, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    bank = bank_of(llama)
    whole, gains, readings = generate_explained(llama, ids(1, 6), bank, max_new_tokens=3, **GREEDY)
    known = byte_tokenizer(EVIL * 2)["input_ids"]

    def ids_of(namespace: str | None, document: str) -> list[int] | None:
        return known if (namespace, document) == (None, "before") else None

    spelled = byte_tokenizer("<b>")["input_ids"]
    tokens = read_tokens(spelled, [], gains, readings, byte_tokenizer, ids_of)
    assert "".join(token.text for token in tokens) == "<b>"
    assert all(each.before + each.text + each.after in EVIL * 2 for token in tokens for each in token.found)
    html = page(EVIL, EVIL, EVIL, tokens, [EVIL])
    assert html.lower().count("<script") == html.lower().count("</script") == 2 and "<!--" not in html
    assert not re.search(r"\b(src|href)\s*=", html) and "innerHTML" not in html
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["prompt"] == EVIL and [token["gain"] for token in data["tokens"]] == gains
    (token, *_) = read_tokens([5], [], gains[:1], readings[:1], byte_tokenizer, lambda *_: None)
    assert len(whole) == 9 and token.found and all(each.text == "" for each in token.found)  # the document is gone
