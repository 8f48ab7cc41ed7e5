"""Which layer's keys are worth remembering: the measurement behind ``longmem layers``.

Every head of every layer is asked, with its position-free queries, for the token that followed an earlier occurrence
of the current one, in repeated text and in repeated random tokens. See ``longmem.modeling.copying``.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longmem.errors import ConfigError, DataError
from longmem.evaluation.loading import backbone_of, checkpoint_folder
from longmem.evaluation.results import Json, RunHeader, as_json
from longmem.modeling import loading
from longmem.modeling.copying import (
    allowed_memory_layers,
    best_memory_layer,
    copy_loss,
    layer_scores,
    random_tokens,
    retrieval_by_layer,
)
from longmem.modeling.families import Family
from longmem.progress import track

DISTANCES = (128, 256, 512, 1024)
MOST_PIECES = 4  # of a row, for distances shorter than it
STANDARD_TEXT = ("argparse.py", "difflib.py", "doctest.py", "inspect.py", "subprocess.py", "typing.py")
"""Standard library sources that stand in for ``--data``: text that every machine has."""


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
) -> Json:
    """Rank every layer and head of a causal language model.

    Args:
        model: any causal language model that ``Backbone`` takes, in its place and dtype.
        text: (rows, n) token ids of text, n at least the smallest distance; None measures random tokens only.
        distances: tokens between the two occurrences.
        segment: tokens encoded at once; None is the model's window, at most 1,024.
        rows: of random tokens.
        stride: of the SideNet that will copy the layer.
        name: of the model, for the record.
        command: as typed, for the record.

    Returns:
        the JSON of the result file. ``num_layers`` of the backbone; ``memory_layers`` that the family can remember;
        ``allowed``, those of them that a SideNet of this stride copies; ``scores`` of each layer, 0 is chance and 1 is
        best; ``recommended``, the best allowed layer, None where the backbone does not copy yet; ``default``, the
        paper's choice. ``ranks``: for each source and distance, by layer and head, the median ``rank`` of the right key
        and the share of queries that find the right chunk (``recall``; ``chance`` is a blind head's). ``copying``: nats
        per token on the first and the second pass of the same tokens within one window.

    Raises:
        ConfigError: settings that contradict each other.
        BackboneError: a model that cannot be remembered.
    """
    family = Family.of(model)
    segment = segment or min(getattr(family.config, "max_position_embeddings", None) or 1024, 1024)
    problems = [f"segment ({segment}) must be at least 2"] if segment < 2 else []
    if chunk_size < 1 or num_retrieved < 1 or num_retrieved % max(1, chunk_size):
        said = f"must be a multiple of chunk_size ({chunk_size}); try 64 and 4"
        problems.append(f"num_retrieved ({num_retrieved}) {said}")
    elif not distances or min(distances) <= num_retrieved:
        problems.append(
            f"distances ({', '.join(map(str, distances))}) must all exceed num_retrieved ({num_retrieved}): a query "
            "may not retrieve everything there is"
        )
    if problems:
        raise ConfigError(problems)
    special = [token for token in (model.config.bos_token_id, model.config.eos_token_id) if isinstance(token, int)]
    drawn = random_tokens(family.config.vocab_size, rows, max(distances), seed=seed, special=special)
    sources = {"random": drawn} if text is None else {"text": text, "random": drawn}
    jobs = [(source, d) for source, t in sources.items() for d in sorted(set(distances)) if d <= t.shape[1]]
    found, ranks, copying = [], [], []
    for source, distance in track(jobs, "measuring layers", len(jobs), "distances"):
        count = min(MOST_PIECES, sources[source].shape[1] // distance)
        pieces = sources[source][:, : count * distance].reshape(-1, distance).to(next(model.parameters()).device)
        heads = retrieval_by_layer(
            model, pieces, segment=segment, chunk_size=chunk_size, num_chunks=num_retrieved // chunk_size
        )
        found.append(heads)
        first = next(iter(heads.values()))
        ranks.append(
            {
                "source": source,
                "distance": first.keys,
                "segment": min(segment, distance),
                "queries": len(pieces) * (first.keys - 1),
                "chance": first.chance,
                "rank": {layer: head.rank.tolist() for layer, head in heads.items()},
                "recall": {layer: head.recall.tolist() for layer, head in heads.items()},
                "score": {layer: head.score for layer, head in heads.items()},
            }
        )
        if 2 * distance <= segment:
            first_loss, second_loss = copy_loss(model, pieces)
            about = {"source": source, "distance": distance}
            copying.append(about | {"first_loss": first_loss, "second_loss": second_loss})
    allowed, scores = allowed_memory_layers(family, stride), layer_scores(found)
    header = RunHeader(
        task="layers",
        command=command,
        config={
            "distances": sorted(set(distances)),
            "segment": segment,
            "chunk_size": chunk_size,
            "num_retrieved": num_retrieved,
            "stride": stride,
        },
        models={"backbone": name, "class": type(model).__name__},
        samples={source: len(tokens) for source, tokens in sources.items()},
        seeds=[seed],
    )
    result: Json = as_json(
        {
            "header": header,
            "num_layers": len(family.layers),
            "memory_layers": family.memory_layers(),
            "allowed": allowed,
            "scores": scores,
            "recommended": best_memory_layer(scores, allowed),
            "default": loading.default_memory_layer(model, stride),
            "ranks": ranks,
            "copying": copying,
        }
    )
    return result


def conclusion(result: Json) -> str:
    """One sentence for a reader in a hurry."""
    if result["recommended"] is None:
        return (
            "no layer stands out from chance: the backbone does not copy from its context yet; train it longer, or "
            f"keep the paper's layer {result['default']}"
        )
    return f"remember layer {result['recommended']} (the paper's rule gives {result['default']})"


def load_backbone(path: str, *, device: str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, str]:
    """A causal language model, or the backbone that a checkpoint names; and where its tokenizer should be."""
    where, revision = backbone_of(checkpoint_folder(path))
    model: Any = loading.load_backbone(where, revision, dtype)
    return model.to(device).eval(), where


def text_rows(documents: Sequence[str], tokenizer: Any, rows: int, length: int) -> Tensor:
    """(rows, length) token ids, from the middle of as many documents as there are long enough ones.

    Raises:
        DataError: there is not enough text for one row.
    """
    encoded = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents]
    stock = sorted((ids for ids in encoded if len(ids) >= length), key=len, reverse=True)
    stock = stock or [[token for ids in encoded for token in ids]]
    if len(stock[0]) < length:
        raise DataError(
            f"--data has {len(stock[0]):,} tokens, {length:,} are needed; give more text, or smaller --distances"
        )
    stock = stock[:rows]
    chosen = []
    for row in range(rows):
        ids, turn, turns = stock[row % len(stock)], row // len(stock), -(-rows // len(stock))
        # rows of one document are spread over it, and its first lines are left out where there is room
        start = (len(ids) - length) * (2 * turn + 1) // (2 * turns)
        chosen.append(ids[start : start + length])
    return torch.tensor(chosen)


def standard_text() -> list[str]:
    """Sources of this Python's own standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return [(folder / name).read_text(encoding="utf-8") for name in STANDARD_TEXT if (folder / name).is_file()]
