"""Generate far beyond the local window: time per token, memory, and the same tokens as without any cache.

Usage: python -m benchmarks.endless [--tokens 20000] [--window 512] [--session 65536] [--no-reference] [--out FILE]

A random Llama of four layers continues a random prompt greedily. Times are of the process' own CPU where there is no
GPU, so that other work on the machine counts less. The reference takes the same steps one by one with no cache and no
``generate``: a forward over the window, the tokens that no longer fit encoded and added to a bank. Its tokens must be
equal.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import surroundings
from longmem import LongMem, MemoryBank
from longmem.evaluation.results import write_json
from longmem.memory.session import SessionMemory

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


class Clock:
    """A streamer that notes when each token came and how much memory was in use."""

    def __init__(self, device: torch.device, every: int) -> None:
        self.times: list[float] = []
        self.bytes: list[int] = []
        self._device, self._every, self._prompt = device, every, True
        self._now = time.process_time if device.type == "cpu" else time.perf_counter

    def put(self, _: Tensor) -> None:
        if self._prompt:
            self._prompt = False
            return
        if len(self.times) % self._every == 0:
            self.bytes.append(bytes_in_use(self._device))
        self.times.append(self._now())

    def end(self) -> None:
        self.bytes.append(bytes_in_use(self._device))


def bytes_in_use(device: torch.device) -> int:
    """Allocated on the GPU, or the process' resident memory."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def make_model(device: torch.device, memory_size: int, seed: int) -> LongMem:
    """Random, with weights large enough that memory decides many a token."""
    torch.manual_seed(seed)
    backbone = LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    model = LongMem.from_backbone(backbone, num_retrieved=32, memory_size=memory_size).eval()
    attention = model.backbone.family.attention(model.sidenet.layers[model.augmented_layer])
    with torch.no_grad():
        model.backbone.family.output_projection(attention).weight.mul_(5.0)  # type: ignore[operator, union-attr]
    return model.to(device)


@torch.no_grad()
def reference(model: LongMem, prompt: Tensor, new: int, window: int, move: int, capacity: int) -> list[int]:
    """The same steps without any cache."""
    bank = MemoryBank.for_model(model, capacity_tokens=capacity)
    text, start = prompt[0].tolist(), 0
    for step in range(new):
        while len(text) - start > window:
            bank.add(model.encode(torch.tensor([text[start : start + move]], device=model.device)))
            start += move
        out = model(torch.tensor([text[start:]], device=model.device), memory=bank, logits_to_keep=1, use_cache=False)
        text.append(int(out.logits[0, -1].argmax()))
        if step % 1000 == 0:
            print(f"reference: {step} tokens", file=sys.stderr, flush=True)
    return text


def measure(
    tokens: int,
    window: int,
    move: int,
    session_tokens: int,
    *,
    prompt_tokens: int = 16,
    device: str = "cpu",
    seed: int = 0,
    with_reference: bool = True,
) -> dict[str, Any]:
    """One run, as a dict for JSON."""
    place = torch.device(device)
    model = make_model(place, session_tokens, seed)
    prompt = torch.randint(0, SHAPE["vocab_size"], (1, prompt_tokens)).to(place)
    settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "window": window, "window_move": move}
    model.generate(prompt, max_new_tokens=4 * window, session_tokens=session_tokens, **settings)  # warm up
    session = SessionMemory.for_model(model, capacity_tokens=session_tokens)
    # written once, so that the bank's own pages are there before the count begins
    session.add(model.encode(prompt.repeat(1, max(1, window // prompt_tokens))), documents=["warm up"])
    session.drop()
    part = max(window, tokens // 10 // window * window)  # whole windows, so that every part holds as many moves
    clock = Clock(place, every=max(1, tokens // 100))
    done = model.generate(prompt, max_new_tokens=tokens, memory=session, streamer=clock, **settings)[0].tolist()
    per_token = [(clock.times[end] - clock.times[end - part]) / part for end in range(part, len(clock.times), part)]
    steps = sorted(later - earlier for earlier, later in zip(clock.times, clock.times[1:], strict=False))
    ends = [
        (clock.times[i * part + part] - clock.times[i * part]) / part for i in (0, (len(clock.times) - 1) // part - 1)
    ]
    equal = None
    if with_reference:
        equal = reference(model, prompt, tokens, window, move, session_tokens) == done
    tenth = len(clock.bytes) // 10
    return {
        "tokens": tokens,
        "window": window,
        "window_move": move,
        "session_tokens": session_tokens,
        "session_tokens_at_end": int(session.tokens[0]),
        "seconds_are": "CPU time of the process" if place.type == "cpu" else "wall time",
        "seconds_per_token": per_token,
        "seconds_per_token_first": ends[0],
        "seconds_per_token_last": ends[1],
        "last_over_first": ends[1] / ends[0],
        "slowest_step_seconds": steps[-1],
        "median_step_seconds": statistics.median(steps),
        "bytes_in_use": clock.bytes,
        "bytes_grown_after_first_tenth": clock.bytes[-1] - clock.bytes[tenth],
        "text_bytes_themselves": 8 * tokens,
        "different_tokens": len(set(done)),
        "equal_to_reference_without_cache": equal,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run, print the figures, keep the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000, help="to generate")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--move", type=int, help="tokens that move when the window is full (default: half of it)")
    parser.add_argument("--session", type=int, default=65_536, help="most tokens in memory")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-reference", action="store_true", help="do not check the tokens, which takes much longer")
    parser.add_argument("--out", type=Path, default=Path("results/endless.json"))
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    result = {
        "command": " ".join(["python -m benchmarks.endless", *(sys.argv[1:] if arguments is None else arguments)]),
        "seed": given.seed,
        "surroundings": surroundings(torch.device(given.device)),
        **measure(
            given.tokens,
            given.window,
            given.move or given.window // 2,
            given.session,
            device=given.device,
            seed=given.seed,
            with_reference=not given.no_reference,
        ),
    }
    write_json(given.out, result)
    print(
        f"{result['tokens']:,} tokens, window {result['window']}: {1e3 * result['seconds_per_token_first']:.2f} ms a "
        f"token at first, {1e3 * result['seconds_per_token_last']:.2f} at last, "
        f"{result['last_over_first']:.2f} times; "
        f"{result['bytes_grown_after_first_tenth'] / 2**20:+.1f} MiB after the first tenth; "
        f"equal to the reference: {result['equal_to_reference_without_cache']}"
    )
    return result


if __name__ == "__main__":
    main()
