"""What memory did to each token: the numbers, and the page that shows them."""

import json
import re

import pytest
import torch
from tests.generation.models import bank_of, ids, longmem
from transformers import PreTrainedTokenizerFast

from longmem import LongMem, SessionMemory
from longmem.generation.page import Explanation, generate_explained, page, read_tokens, reading_at
from longmem.types import ChunkOrigin

GREEDY = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
EVIL = "</script><script>alert(1)</script><!-- \u2028"


@pytest.fixture(scope="module")
def llama() -> LongMem:
    return longmem("llama")


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
    shares = torch.tensor([[0.2, 0.0], [0.3, 0.1]]).view(1, 2, 1, 2)
    origins = {(3, chunk): ChunkOrigin("book", chunk * 2, 2, chunk, 0.0) for chunk in range(2)}
    explanation = Explanation(torch.tensor([3]), found, 10 * shares, shares, origins, layers=(5, 9))
    assert [(each.score, each.origin.start_token) for each in explanation.token(0)] == [(2.0, 0), (3.0, 2)]
    assert explanation.token(-1, top=1) == explanation.token(0)[:1]
    read = reading_at(explanation, 0)
    assert explanation.over([]) == []
    assert read.layers == pytest.approx({5: 0.2, 9: 0.4}) and read.share == pytest.approx(0.3)
    assert [(each.chunk, each.share, each.layers) for each in read.chunks] == [
        (0, pytest.approx(0.15), pytest.approx({5: 0.2, 9: 0.1})),
        (1, pytest.approx(0.15), pytest.approx({9: 0.3})),
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
