"""On a GPU: every model and memory against the same on the CPU, then what reading memory costs beside the backbone.

Correctness in float32, over tiny models: logits, gradients, what a search finds, generated tokens, a bank over a
store. Timings over a backbone of the user's, or a random one of SmolLM2-135M's shape: medians, in turn.

Usage: python -m benchmarks.gpu [--model FOLDER] [--out results/gpu.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Run, interleaved, made_by, spread
from longmem import LongMem, MemoryBank, MemoryStore, MemTRM, TrainingFree
from longmem.evaluation.results import write_json
from longmem.memory.session import JoinedMemory

KINDS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "LongMem, gate": (LongMem, {}),
    "LongMem, softmax, zero": (LongMem, {"fusion": "softmax", "init": "zero"}),
    "LongMem, token, delta": (LongMem, {"fusion": "token", "init": "delta", "stride": 1, "trained": "attention"}),
    "TrainingFree, token": (TrainingFree, {"fusion": "token"}),
    "MemTRM": (MemTRM, {}),
}
SHAPE = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=6, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=256,
        )
    )  # fmt: skip


def same(kind: str, device: torch.device) -> dict[str, Any]:
    """Largest differences of one model on the device from itself on the CPU."""
    made, settings = KINDS[kind]
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (3, 40), generator=draw)
    past = torch.randint(3, 128, (3, 203), generator=draw)
    found: dict[str, Any] = {}
    for where in (torch.device("cpu"), device):
        torch.manual_seed(2)
        model = made.from_backbone(tiny().to(where), memory_layers=(1, 3), num_retrieved=32, **settings).to(where)
        bank = MemoryBank.for_model(model, rows=3, capacity_tokens=256)
        with torch.no_grad():
            bank.add(model.encode(past.to(where)))
        out = model(ids.to(where), labels=ids.to(where), memory=bank)
        out.loss.backward()
        grads = torch.cat([p.grad.flatten().cpu() for p in model.trainable_parameters() if p.grad is not None])
        with torch.no_grad():
            new = model.generate(
                ids.to(where)[:, :8], memory=bank, max_new_tokens=24, do_sample=False, pad_token_id=0,
                eos_token_id=None, window=16, window_move=8,
            )  # fmt: skip
            stored = out.logits[:0]
            if made is not MemTRM:  # whose weights change, so nothing of it is stored
                with (
                    tempfile.TemporaryDirectory() as folder,
                    MemoryStore.open(Path(folder) / "s", model=model) as store,
                ):
                    for name, row in zip("abc", past.tolist(), strict=True):
                        store.add_document(name, name=name, ids=row)
                    banks = JoinedMemory([store.bank(name, device=where) for name in "abc"])
                    stored = model(ids.to(where), memory=banks).logits
        found[where.type] = (
            out.logits.detach().cpu(),
            out.reads[0].retrieved.chunks.cpu(),
            grads,
            new.cpu(),
            stored.cpu(),
        )
    mine, theirs = found["cpu"], found[device.type]
    return {
        "logits": float((mine[0] - theirs[0]).abs().max()),
        "chunks_that_differ": int((mine[1] != theirs[1]).sum()),
        "gradients": float((mine[2] - theirs[2]).abs().max() / mine[2].abs().max()),
        "logits_over_a_store": float((mine[4] - theirs[4]).abs().max()) if len(mine[4]) else None,
        "same_generated": bool(torch.equal(mine[3], theirs[3])),
    }


def milliseconds(runs: dict[str, Run], repeats: int) -> dict[str, dict[str, float]]:
    """Median, least and most of each run."""
    taken = interleaved(runs, repeats, warmup=2)
    spreads = {name: spread([each["total"] for each in some]) for name, some in taken.items()}
    return {name: {k: round(1e3 * v, 2) for k, v in found.items()} for name, found in spreads.items()}


def timings(backbone: Any, device: torch.device, repeats: int) -> dict[str, Any]:
    """Milliseconds of one segment of 1,024 tokens, 8 rows, and of a decoded token, by tokens of memory."""
    settings: dict[str, Any] = {"memory_layers": (18, 20, 23), "fusion": "token"}
    reader = TrainingFree.from_backbone(backbone, **settings)
    sidenet = LongMem.from_backbone(backbone, init="delta", stride=1, trained="attention", **settings)
    ids = torch.randint(3, 40000, (8, 1024), device=device)
    first = torch.zeros(1, dtype=torch.long)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for tokens in (8192, 65536):
            bank = MemoryBank.for_model(reader, rows=8, capacity_tokens=tokens)
            kv = reader.encode(ids)
            for _ in range(tokens // 1024):
                bank.add(kv)
            runs = {
                "backbone": lambda: backbone(ids, use_cache=False).logits,
                "calibrated": lambda bank=bank: reader(ids, memory=bank, use_cache=False).logits,
                "sidenet": lambda bank=bank: sidenet(ids, memory=bank, use_cache=False).logits,
                "encode": lambda: reader.encode(ids),
                "backbone_token": lambda: backbone(ids[:1, :1], use_cache=False).logits,
                "calibrated_token": lambda bank=bank: (
                    reader(ids[:1, :1], memory=bank, memory_rows=first, use_cache=False).logits
                ),
            }
            found[str(tokens)] = milliseconds(runs, repeats)
            del bank
        bank = MemoryBank.for_model(reader, rows=1, capacity_tokens=1 << 20)
        for _ in range((1 << 20) // 8192):
            bank.add(type(kv)(*(t.transpose(0, 1).flatten(1, 2)[None] for t in (kv.keys, kv.values))))
        runs = {
            "backbone": lambda: backbone(ids[:1], use_cache=False).logits,
            "calibrated": lambda: reader(ids[:1], memory=bank, use_cache=False).logits,
            "calibrated_token": lambda: reader(ids[:1, :1], memory=bank, use_cache=False).logits,
        }
        found["1048576, one row"] = milliseconds(runs, repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="backbone folder; default: a random one of SmolLM2-135M's shape")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device(given.device)
    report = made_by("gpu", None, given.device) | {"correct": {}}
    torch.backends.cuda.matmul.allow_tf32 = False
    for kind in KINDS:
        report["correct"][kind] = same(kind, device)
        print(kind, report["correct"][kind], flush=True)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if given.model:
        backbone = AutoModelForCausalLM.from_pretrained(given.model, dtype=dtype)
    else:
        backbone = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(dtype)
    report["milliseconds"] = timings(backbone.to(device).eval(), device, given.repeats)
    print(json.dumps(report["milliseconds"], indent=1), flush=True)
    if given.out:
        write_json(given.out, report)


if __name__ == "__main__":
    main()
