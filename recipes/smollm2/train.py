"""Train models/smollm2-135m-longmem: a SideNet over SmolLM2-135M that reads several layers and learns from the context.

The teacher is the same frozen backbone with a whole piece in its window; the student has one segment, and the rest in
memory. The loss is cross entropy and the divergence from the teacher, and where the place of an answer is known, a
loss on the search itself. See ``pieces.py`` for the data.

    python recipes/smollm2/train.py --backbone DIR --pieces DIR --valid DIR --out DIR --minutes 60
    the control:  ... --control
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longmem import LongMem, MemoryBank, TrainingFree
from longmem.modeling.loading import load_backbone
from longmem.training.models import runs_bf16

WINDOW, SEGMENTS = 1024, 8
PIECE = WINDOW * SEGMENTS
TEXT = 4


class Pieces:
    """Pieces on the device, and what the teacher says of them.

    Args:
        folder: written by ``pieces.py``.
        device: of all tensors.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.ids = torch.from_numpy(np.load(folder / "ids.npy").astype(np.int32)).to(device)
        self.weights = torch.from_numpy(np.load(folder / "weights.npy")).to(device)
        self.fresh = torch.from_numpy(np.load(folder / "fresh.npy"))  # (pieces, SEGMENTS), on the CPU
        links = torch.from_numpy(np.load(folder / "links.npy").astype(np.int64)).to(device)
        self.links = links[links[:, 0].argsort(stable=True)]
        self.first = torch.searchsorted(self.links[:, 0].contiguous(), torch.arange(len(self.ids) + 1, device=device))
        self.kinds: list[str] = json.loads((folder / "kinds.json").read_text())

    def __len__(self) -> int:
        return len(self.ids)


class Teacher(NamedTuple):
    """What the backbone with a whole piece in its window expects, for some pieces.

    Attributes:
        top: (B, PIECE, keep) its best tokens.
        share: (B, PIECE, keep) their probabilities among themselves.
        nats: (B, PIECE) of the true tokens.
    """

    top: Tensor
    share: Tensor
    nats: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, backbone: Any, ids: Tensor, keep: int, at_once: int = 8) -> Teacher:
        """Ask it about pieces (B, PIECE + 1), ``at_once`` at a time."""
        found = []
        for some in ids.long().split(at_once):
            hidden = backbone.model(input_ids=some[:, :-1], use_cache=False).last_hidden_state
            for place, true in zip(hidden.split(WINDOW, 1), some[:, 1:, None].split(WINDOW, 1), strict=True):
                logits = backbone.lm_head(place).float()
                best = logits.topk(keep, dim=-1)
                nats = logits.logsumexp(-1) - logits.gather(-1, true).squeeze(-1)
                found.append((best.indices, best.values.softmax(-1), nats))
        rows = [found[at : at + SEGMENTS] for at in range(0, len(found), SEGMENTS)]
        return cls(
            *(
                torch.cat([torch.cat(part, 1) for part in parts])
                for parts in zip(*(zip(*r, strict=True) for r in rows), strict=True)
            )
        )


class Reader:
    """A model with a memory for the pieces that it reads side by side, segment by segment.

    Args:
        model: that is trained.
        rows: pieces at once.
        memory: tokens that a row remembers; more than a piece has, so earlier pieces stand beside this one. 0: none.
    """

    def __init__(self, model: LongMem, rows: int, memory: int) -> None:
        self.model, self.bank = model, None
        self.begun = torch.zeros(rows, dtype=torch.long, device=model.device)  # number of each piece's first chunk
        if memory:
            self.bank = MemoryBank.for_model(model, rows=rows, capacity_tokens=memory)

    def segment(
        self, pieces: Pieces, some: Tensor, number: int, teacher: Teacher | None, given: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """Read a segment of some pieces.

        Returns:
            the loss, nats (B, T) of the true tokens, the loss of the search, and the output whose ``kv`` is to be
            written by ``write`` after backward.
        """
        if self.bank is not None:
            if number == 0:
                self.begun = self.bank.numbers.amax(1) + 1
            fresh = pieces.fresh[some.cpu(), number].nonzero().flatten()
            if len(fresh):
                self.bank.reset(fresh)
                self.begun[fresh] = -(number * WINDOW) // self.bank.chunk_size
        part = slice(number * WINDOW, (number + 1) * WINDOW)
        ids = pieces.ids[some, number * WINDOW : (number + 1) * WINDOW + 1].long()
        weight = pieces.weights[some, part].float()
        memory = {} if self.bank is None else {"memory": self.bank}
        out = self.model(input_ids=ids[:, :-1], use_cache=False, **memory)
        logits = out.logits.float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weight)
        nats = loss.detach()
        if teacher is not None:
            told = (logits.gather(-1, teacher.top[:, part]) * teacher.share[:, part]).sum(-1)
            true = logits.gather(-1, ids[:, 1:, None]).squeeze(-1)
            loss = torch.where(weight <= TEXT, loss + given.teacher * (true - told), loss)
        search = logits.new_zeros(())
        if self.bank is not None and given.search and number:
            search = self._search_loss(pieces, some, number, out.reads, given.links)
        return (loss * weight).sum() / weight.sum().clamp_min(1), nats, search, out

    def write(self, out: Any, some: Tensor, number: int) -> None:
        """Remember what was read."""
        if self.bank is not None:
            documents = [f"{piece}" for piece in some.tolist()]
            self.bank.add(out.kv, documents=documents, offsets=[number * WINDOW] * len(documents))

    def _search_loss(self, pieces: Pieces, some: Tensor, number: int, reads: Any, most: int) -> Tensor:
        """Mean over asked tokens of -log of the probability that some head gives the chunk that was told."""
        assert self.bank is not None
        links = torch.cat(
            [
                torch.nn.functional.pad(
                    pieces.links[pieces.first[piece] : pieces.first[piece + 1], 1:], (1, 0), value=row
                )
                for row, piece in enumerate(some.tolist())
            ]
        )
        links = links[(links[:, 1] // WINDOW == number) & (links[:, 2] < number * WINDOW)]
        if not len(links):
            return torch.zeros((), device=links.device)
        row, place, source = links[torch.randperm(len(links), device=links.device)[:most]].unbind(1)
        size, heads = self.bank.chunk_size, self.bank.heads_kv
        chunk = (self.begun[row] + source // size) % (self.bank.capacity_tokens // size)
        chunks = self.bank.chunks.to(links.device)
        live = int(chunks.max())
        empty = (torch.arange(live, device=links.device) >= chunks[row, None])[:, None, None]
        found = []
        for layer, read in enumerate(reads):
            queries = read.queries[row, :, place % WINDOW].float().unflatten(1, (heads, -1))  # (n, Hkv, G, D)
            keys = self.bank.keys[:, layer * heads : (layer + 1) * heads, :live].float()[row]
            scores = torch.einsum("nhgd,nhcd->nhgc", queries, keys) * queries.shape[-1] ** -0.5
            scores = scores.masked_fill(empty, -torch.inf)
            right = scores.gather(-1, chunk.view(-1, 1, 1, 1).expand(*scores.shape[:3], 1)).squeeze(-1)
            found.append((right - scores.logsumexp(-1)).flatten(1))
        return -torch.cat(found, dim=1).logsumexp(1).mean()


@torch.no_grad()
def validate(model: LongMem, pieces: Pieces, rows: int, memory: int, given: Any) -> dict[str, float]:
    """Nats per token of each kind of text, from the second segment on, and of answers."""
    nats = torch.zeros(len(pieces), PIECE, device=pieces.ids.device)
    model.train(False)
    for first in range(0, len(pieces), rows):
        some = torch.arange(first, min(first + rows, len(pieces)), device=nats.device)
        reader = Reader(model, len(some), memory)
        for number in range(SEGMENTS):
            _, found, _, out = reader.segment(pieces, some, number, None, argparse.Namespace(search=0))
            nats[some, number * WINDOW : (number + 1) * WINDOW] = found
            reader.write(out, some, number)
    model.train(True)
    return by_kind(pieces, nats)


def by_kind(pieces: Pieces, nats: Tensor) -> dict[str, float]:
    """Means of nats (N, PIECE), and those of the first segment, whose memory is empty."""
    found = {}
    later = torch.arange(PIECE, device=nats.device) >= WINDOW
    for kind in sorted(set(pieces.kinds)):
        mine = torch.tensor([each == kind for each in pieces.kinds], device=nats.device)[:, None]
        asked = kind in ("asking", "story", "labelled")
        counted = (pieces.weights > TEXT if asked else pieces.weights == TEXT) & mine
        found[kind] = round(float(nats[counted & later].mean()), 4)
        if not asked:
            found[f"{kind}, empty memory"] = round(float(nats[counted & ~later].mean()), 4)
    return found


def optimiser(model: LongMem, rate: float) -> torch.optim.Optimizer:
    """Adam; the numbers of the gates have far to go, and their vectors less so."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    rates = [(20 * rate if w.ndim == 1 else 5 * rate) if ".gates." in name else rate for name, w in named]
    groups = [{"params": [w], "lr": r, "top": r} for (_, w), r in zip(named, rates, strict=True)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=named[0][1].is_cuda)


def done(step: int, began: float, given: Any) -> float:
    """The share of the training that is over."""
    return step / given.steps if given.steps else (time.monotonic() - began) / (60 * given.minutes)


def save(model: LongMem, backbone: Any, out: Path, gates: bool) -> None:
    """The SideNet in bfloat16; or its gates as a ``TrainingFree``."""
    if not gates:
        weights = {
            name: weight.bfloat16() for name, weight in model.state_dict().items() if name.startswith("sidenet.")
        }
        return model.save_pretrained(out, state_dict=weights, max_shard_size="14MB")
    calibrated = TrainingFree.from_backbone(backbone, memory_layers=model.memory_layers, fusion="token")
    assert calibrated.gates is not None and model.sidenet.gates is not None
    calibrated.gates.load_state_dict(model.sidenet.gates.state_dict())
    calibrated.save_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("backbone", "pieces", "valid", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="a SideNet to go on from")
    parser.add_argument("--layers", default="18,20,23")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--memory", type=int, default=2 * PIECE)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--teacher", type=float, default=0.5, help="weight of the divergence from the teacher")
    parser.add_argument("--search", type=float, default=0.2, help="weight of the loss on the search")
    parser.add_argument("--links", type=int, default=256)
    parser.add_argument("--looks", type=int, default=4, help="validations, spread over the time")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="the same model without memory")
    parser.add_argument("--gates", action="store_true", help="train the gates alone: models/smollm2-135m-calibrated")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(given.seed)
    given.out.mkdir(parents=True, exist_ok=True)
    log = (given.out / "log.jsonl").open("a")

    def say(**what: Any) -> None:
        print(json.dumps(what), file=log, flush=True)
        print(json.dumps(what), flush=True)

    half = runs_bf16("auto", device)
    dtype = torch.bfloat16 if half else torch.float32
    backbone = load_backbone(str(given.backbone), None, dtype).to(device)
    layers = tuple(map(int, given.layers.split(",")))
    if given.start:
        model = LongMem.from_pretrained(given.start, backbone=backbone, side_dtype=torch.float32)
    else:
        model = LongMem.from_backbone(
            backbone, memory_layers=layers, init="delta", trained="attention", stride=1, fusion="token",
            side_dtype=torch.float32,
        )  # fmt: skip
        assert model.sidenet.gates is not None
        for gate in model.sidenet.gates:
            nn.init.constant_(gate.bias, -1.0)
    if given.gates:
        model.sidenet.requires_grad_(False)
        model.sidenet.gates.requires_grad_(True)
    model.to(device)
    pieces, valid = Pieces(given.pieces, device), Pieces(given.valid, device)
    valid.fresh &= torch.tensor([kind == "story" for kind in valid.kinds])[:, None]
    memory = 0 if given.control else given.memory
    began = time.monotonic()
    if given.teacher:
        nats = torch.cat([Teacher.of(backbone, ids, 1).nats for ids in valid.ids.split(8)])
        say(teacher=by_kind(valid, nats), seconds=round(time.monotonic() - began, 1))
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        say(
            memory_off=validate(model, valid, given.rows, 0, given),
            start=validate(model, valid, given.rows, memory, given),
        )
    optimizer = optimiser(model, given.rate)
    model.train(True)
    reader = Reader(model, given.rows, memory)
    draw, order = torch.Generator().manual_seed(given.seed), []
    step, looks, began = 0, 0, time.monotonic()
    seen = torch.zeros(3, device=device)
    while True:
        part = done(step, began, given)
        if part * given.looks >= looks + 1:
            looks += 1
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                say(step=step, tokens=step * given.rows * WINDOW, part=round(part, 3),
                    train=[round(x, 4) for x in (seen / max(1, step)).tolist()],
                    valid=validate(model, valid, given.rows, memory, given))  # fmt: skip
            save(model, backbone, given.out / "final", given.gates)
        if part >= 1:
            break
        if len(order) < given.rows:
            order += torch.randperm(len(pieces), generator=draw).tolist()
        some = torch.tensor([order.pop() for _ in range(given.rows)], device=device)
        teacher = Teacher.of(backbone, pieces.ids[some], 32) if given.teacher else None
        for number in range(SEGMENTS):
            part = min(1.0, done(step, began, given))
            factor = min(1.0, (step + 1) / 40) * (0.05 + 0.475 * (1 + math.cos(math.pi * part)))
            for group in optimizer.param_groups:
                group["lr"] = factor * group["top"]
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                loss, _, search, out = reader.segment(pieces, some, number, teacher, given)
            (loss + given.search * search).backward()
            norm = nn.utils.clip_grad_norm_([w for w in model.parameters() if w.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            reader.write(out, some, number)
            seen += torch.stack([loss.detach(), search.detach(), norm])
            step += 1
            if step % 40 == 0:
                say(
                    step=step,
                    seconds=round(time.monotonic() - began, 1),
                    loss=round(loss.item(), 4),
                    search=round(search.item(), 4),
                )


if __name__ == "__main__":
    main()
