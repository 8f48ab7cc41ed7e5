"""Which layer's keys are worth remembering: the measurement behind ``longmem layers``.

Every head of every layer is asked, with its position-free queries, for the token that followed an earlier occurrence
of the current one, in repeated text and in repeated random tokens. See ``longmem.modeling.copying``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError
from longmem.evaluation.results import RunHeader
from longmem.modeling.copying import (
    HeadRanks,
    allowed_memory_layers,
    best_memory_layer,
    copy_loss,
    layer_scores,
    random_tokens,
    retrieval_by_layer,
)
from longmem.modeling.families import Family
from longmem.modeling.loading import default_memory_layer

DISTANCES = (128, 256, 512, 1024)
MOST_PIECES = 4  # of a row, for distances shorter than it


@dataclass(frozen=True)
class Ranks:
    """One source of text at one distance.

    Attributes:
        source: ``text`` or ``random``.
        distance: tokens between the two occurrences, and keys to choose from.
        segment: tokens encoded at once.
        queries: how many were asked per head.
        chance: recall of a blind head; its median rank is half the distance.
        rank: for each layer, the median rank of the right key in each head.
        recall: for each layer, the share of queries in each head that find the right chunk.
        score: for each layer, see ``HeadRanks.score``.
    """

    source: str
    distance: int
    segment: int
    queries: int
    chance: float
    rank: dict[int, list[float]]
    recall: dict[int, list[float]]
    score: dict[int, float]


@dataclass(frozen=True)
class Copying:
    """Nats per token on the first and the second pass of the same tokens within one window."""

    source: str
    distance: int
    first_loss: float
    second_loss: float


@dataclass(frozen=True)
class LayerReport:
    """What ``longmem layers`` found.

    Attributes:
        header: what was run.
        num_layers: of the backbone.
        memory_layers: those that the family can remember.
        allowed: those of them that a SideNet of this stride copies.
        scores: for each measured layer, its mean score; 0 is chance, 1 is best.
        recommended: the best allowed layer; None where the backbone does not copy yet.
        default: the paper's choice, three quarters of the depth.
        ranks: every measurement.
        copying: copy losses.
    """

    header: RunHeader
    num_layers: int
    memory_layers: list[int]
    allowed: list[int]
    scores: dict[int, float]
    recommended: int | None
    default: int
    ranks: list[Ranks]
    copying: list[Copying]

    def farthest(self) -> list[Ranks]:
        """The measurement at the greatest distance of each source."""
        far = {ranks.source: ranks for ranks in sorted(self.ranks, key=lambda ranks: ranks.distance)}
        return list(far.values())

    @property
    def conclusion(self) -> str:
        """One sentence for a reader in a hurry."""
        if self.recommended is None:
            return (
                "no layer stands out from chance: the backbone does not copy from its context yet; train it longer, or "
                f"keep the paper's layer {self.default}"
            )
        return f"remember layer {self.recommended} (the paper's rule gives {self.default})"


@torch.no_grad()
def measure_layers(
    model: Any,
    text: Tensor | None,
    *,
    distances: Sequence[int] = DISTANCES,
    segment: int | None = None,
    rows: int = 4,
    chunk_size: int = 4,
    num_retrieved: int = 64,
    stride: int = 2,
    seed: int = 0,
    name: str = "",
    command: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> LayerReport:
    """Rank every layer and head of a causal language model.

    Args:
        model: any causal language model that ``Backbone`` takes, in its place and dtype.
        text: (rows, n) token ids of text, n at least the smallest distance; None measures random tokens only.
        distances: tokens between the two occurrences.
        segment: tokens encoded at once; None is the model's window, at most 1,024.
        rows: of random tokens.
        chunk_size: S.
        num_retrieved: K.
        stride: of the SideNet that will copy the layer.
        seed: of the random tokens.
        name: of the model, for the record.
        command: as typed, for the record.
        progress: is told what is measured next.

    Raises:
        ConfigError: settings that contradict each other.
        BackboneError: a model that cannot be remembered.
    """
    family = Family.of(model)
    segment = segment or min(window_of(family.config), 1024)
    _check(distances, segment, chunk_size, num_retrieved)
    far = max(distances)
    device = next(model.parameters()).device
    special = [token for token in (model.config.bos_token_id, model.config.eos_token_id) if isinstance(token, int)]
    drawn = random_tokens(family.config.vocab_size, rows, far, seed=seed, special=special)
    sources = {"random": drawn} if text is None else {"text": text, "random": drawn}
    found, ranks, copying = [], [], []
    for source, tokens in sources.items():
        for distance in sorted(set(distances)):
            if distance > tokens.shape[1]:
                continue
            progress(f"{source}, {distance} tokens apart")
            pieces = _pieces(tokens, distance).to(device)
            heads = retrieval_by_layer(
                model, pieces, segment=segment, chunk_size=chunk_size, num_chunks=num_retrieved // chunk_size
            )
            found.append(heads)
            ranks.append(_ranks(source, distance, min(segment, distance), heads, pieces))
            if 2 * distance <= segment:
                copying.append(Copying(source, distance, *copy_loss(model, pieces)))
    allowed, scores = allowed_memory_layers(family, stride), layer_scores(found)
    layers = len(family.layers)
    settings = {
        "distances": sorted(set(distances)),
        "segment": segment,
        "chunk_size": chunk_size,
        "num_retrieved": num_retrieved,
        "stride": stride,
    }
    return LayerReport(
        header=RunHeader(
            task="layers",
            command=command,
            config=settings,
            models={"backbone": name, "class": type(model).__name__},
            samples={source: len(tokens) for source, tokens in sources.items()},
            seeds=[seed],
        ),
        num_layers=layers,
        memory_layers=family.memory_layers(),
        allowed=allowed,
        scores=scores,
        recommended=best_memory_layer(scores, allowed),
        default=default_memory_layer(model, stride),
        ranks=ranks,
        copying=copying,
    )


def window_of(config: Any) -> int:
    """Tokens a backbone reads at once; 1,024 where its config sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return 1024


def _pieces(tokens: Tensor, distance: int) -> Tensor:
    """Rows of ``distance`` tokens, several from each row where it is longer."""
    count = min(MOST_PIECES, tokens.shape[1] // distance)
    return tokens[:, : count * distance].reshape(-1, distance)


def _ranks(source: str, distance: int, segment: int, heads: dict[int, HeadRanks], pieces: Tensor) -> Ranks:
    first = next(iter(heads.values()))
    return Ranks(
        source=source,
        distance=first.keys,
        segment=segment,
        queries=len(pieces) * (first.keys - 1),
        chance=first.chance,
        rank={layer: found.rank.tolist() for layer, found in heads.items()},
        recall={layer: found.recall.tolist() for layer, found in heads.items()},
        score={layer: found.score for layer, found in heads.items()},
    )


def _check(distances: Sequence[int], segment: int, chunk_size: int, num_retrieved: int) -> None:
    found = []
    if chunk_size < 1 or num_retrieved < 1 or num_retrieved % max(1, chunk_size):
        found.append(f"num_retrieved ({num_retrieved}) must be a multiple of chunk_size ({chunk_size}); try 64 and 4")
    elif not distances or min(distances) <= num_retrieved:
        found.append(
            f"distances ({', '.join(map(str, distances))}) must all exceed num_retrieved ({num_retrieved}): a query "
            "may not retrieve everything there is"
        )
    if segment < 2:
        found.append(f"segment ({segment}) must be at least 2")
    if found:
        raise ConfigError(found)
