"""What is loaded before anything is measured: the systems that are compared, and documents as token ids."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem.data.tokens import first_text, load_tokenizer, start_tokens
from longmem.errors import CheckpointError, ConfigError, DataError
from longmem.evaluation.asking import Asker
from longmem.evaluation.systems import systems_of, with_window
from longmem.modeling.baselines import MemTRM, TrainingFree
from longmem.modeling.checkpoints import (
    MODELS,
    backbone_of,
    checked_device,
    checkpoint_folder,
    model_type,
    tokenizer_beside,
)
from longmem.modeling.loading import load_backbone
from longmem.modeling.longmem import LongMem
from longmem.modeling.weights import fingerprint_of, legacy_fingerprint

log = logging.getLogger(__name__)

LONGEST_DEFAULT_WINDOW = 1024  # the paper's; long-context backbones would otherwise get all they can take
PROJECT_SEPARATOR = "__"


def load_systems(
    path: str,
    *,
    backbone: str | None = None,
    control: str | None = None,
    memtrm: str | None = None,
    training_free: Sequence[str] = (),
    memory_sizes: Sequence[int] | None = None,
    default_sizes: Sequence[int] | None = None,
    tokenizer: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    window: int | None = None,
    rows: int = 8,
    windows: Sequence[int] = (),
    full_context: int | None = None,
) -> list[Asker]:
    """Load a LongMem checkpoint, a baseline, or a causal LM by itself, and what is compared with it.

    Args:
        path: of a LongMem, a MemTRM, training-free settings or a causal LM, see ``checkpoint_folder``.
        control: a SideNet checkpoint trained equally long without memory, over the same backbone.
        memtrm: a MemTRM checkpoint whose training started from the same backbone.
        training_free: for each training-free model the share of its heads that memory gets, or the folder of its
            settings; by share, it remembers and retrieves as the LongMem (or else the MemTRM) beside it does.
        memory_sizes: tokens; None is ``default_sizes``.
        default_sizes: None is the size in the model's config.
        tokenizer: folder or hub id, if not beside the model or its backbone.
        dtype: of the weights; None is as saved.
        window: None is the backbone's positions, at most 1024.
        windows: longer ones that the backbone alone has too.
        full_context: a window of the backbone alone that has what others have in memory.

    Raises:
        ConfigError: settings that do not go together, or a device that is not here.
        CheckpointError, BackboneError: a model that is missing, damaged or made for another backbone.
    """
    device, where = checked_device(device), checkpoint_folder(path)
    kind = model_type(where)
    if kind == "memtrm" and memtrm is None:
        memtrm = where
    if kind == "training_free":
        training_free = (where, *training_free)
    own = control or (memory_sizes and not (memtrm or training_free))
    if (kind != "longmem" and own) or (kind not in MODELS and backbone):
        itself = "baseline" if kind in MODELS else "causal language model"
        raise ConfigError(
            f"--control, --memory-sizes and --backbone are of a LongMem checkpoint; {where} is a {itself} by itself"
        )
    # everything is loaded as it was saved, because a backbone is known by its weights; then it is converted
    main = beside = settings = None
    if kind == "longmem":
        main = LongMem.from_pretrained(where, backbone=backbone)
        bare, named, settings = main.backbone.model, main.config.backbone_name_or_path, main.config
        if control is not None:
            said = "not a LongMem checkpoint; --control takes a SideNet trained without memory"
            beside = LongMem.from_pretrained(checkpoint_folder(control, "longmem", said), backbone=bare)
    else:
        named, revision = (backbone, None) if backbone else backbone_of(where)
        bare = load_backbone(named, revision, None).eval()
    others: list[Any] = []
    if memtrm is not None:
        said = "not a MemTRM checkpoint; --memtrm takes one trained with method = 'memtrm'"
        trained = MemTRM.from_pretrained(checkpoint_folder(memtrm, "memtrm", said))
        start = trained.config.start_fingerprint
        if not (main.accepts(start) if main else start in (fingerprint_of(bare), legacy_fingerprint(bare))):
            raise CheckpointError(
                f"MemTRM was made from backbone {start}, the others stand on {fingerprint_of(bare)}; compare models of "
                "one backbone"
            )
        others.append(trained)
        settings = settings or trained.config
    others += [_load_training_free(gate, bare, settings) for gate in training_free]
    for each in filter(None, (main or bare, beside, *others)):
        torch.nn.Module.to(each, device=device, dtype=dtype)
    config: Any = bare.config
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or LONGEST_DEFAULT_WINDOW
    how: dict[str, Any] = {
        "tokenizer": load_tokenizer(tokenizer or tokenizer_beside(where, named), bare),
        "window": window or min(positions, LONGEST_DEFAULT_WINDOW),
        "rows": rows,
    }
    sizes = memory_sizes or default_sizes
    systems = systems_of(main or bare, _sizes(sizes, settings) if main else (), control=beside, **how)
    for other in others:
        systems += systems_of(other, _sizes(sizes, other.config), **how)
    names = [system.name for system in systems]
    if twice := [system.label for system in systems if names.count(system.name) > 1]:
        raise ConfigError(f"{twice[0]}: compared twice; leave one of them away")
    longer = [with_window(systems[0], size) for size in windows]
    return systems + longer + ([with_window(systems[0], full_context, whole=True)] if full_context else [])


def _load_training_free(gate: str, backbone: Any, settings: Any) -> Any:
    """Over the backbone that is already there, with the settings of the model beside it, or from a folder."""
    try:
        share = float(gate)
    except ValueError:
        said = "no training-free settings; --training-free takes a share from 0 to 1, or the folder of a TrainingFree"
        return TrainingFree.from_pretrained(checkpoint_folder(gate, "training_free", said), backbone=backbone)
    names = ("memory_layers", "chunk_size", "num_retrieved", "memory_size")
    alike = {} if settings is None else {name: getattr(settings, name) for name in names}
    return TrainingFree.from_backbone(backbone, gate=share, **alike)


def _sizes(sizes: Sequence[int] | None, config: Any) -> list[int]:
    """Of memory, sorted; None is the size in the config."""
    chunk = config.chunk_size
    for size in sizes or ():
        if size < 1 or size % chunk:
            near = max(chunk, round(size / chunk) * chunk)
            raise ConfigError(f"memory size ({size}) must be a multiple of chunk_size ({chunk}); try {near}")
    return sorted(set(sizes or [config.memory_size]))


# documents


@dataclass(frozen=True)
class TokenizedDocument:
    """A document's ids (n,), of which all but the first are scored, and the words and UTF-8 bytes of the scored text.

    ``digest`` is the hash of the ids; ``group`` what is reported apart, if anything; documents of one ``project`` are
    not independent, so intervals draw projects first.
    """

    id: str
    ids: Tensor
    words: int
    bytes: int
    digest: str
    group: str | None
    project: str

    @property
    def scored(self) -> int:
        return len(self.ids) - 1


def tokenize_documents(
    documents: Sequence[Any],
    tokenizer: Any,
    *,
    max_tokens: int | None = None,
    group_separator: str | None = None,
) -> list[TokenizedDocument]:
    """Tokenize each document from its beginning.

    Special tokens are as in training: where the tokenizer itself puts a ``<s>`` in front (Llama's does, GPT-2's does
    not), it stays there and the first token of the text is scored too. No end token is added or scored.

    Args:
        documents: records with ``id`` and ``text``.
        max_tokens: keep this many tokens of each document; words and bytes are those of the kept part.
        group_separator: a document's group is its file name up to this string (all of it where it does not occur).
            The group is its project too. None: no groups; the project is the name up to ``__``.

    Raises:
        DataError: no document has two tokens.
    """
    kept, prefix = [], start_tokens(tokenizer)
    first = 0 if prefix else 1
    for document in documents:
        part = document.text if max_tokens is None else first_text(document.text, tokenizer, max_tokens)
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        if len(ids) <= first:
            log.warning("%s: skipped, %d tokens leave nothing to predict", document.id, len(ids))
            continue
        text = tokenizer.decode(ids[first:], clean_up_tokenization_spaces=False)
        ids = [*prefix, *ids]
        group = _group(document.id, group_separator) if group_separator else None
        project = _group(document.id, PROJECT_SEPARATOR) if PROJECT_SEPARATOR in document.id else document.id
        kept.append(
            TokenizedDocument(
                document.id,
                torch.tensor(ids, dtype=torch.long),
                words=len(text.split()),
                bytes=len(text.encode("utf-8", errors="surrogatepass")),
                digest=hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:32],
                group=group,
                project=group or project,
            )
        )
    if not kept:
        raise DataError(
            f"no text to measure: {len(documents)} documents read, none has two tokens; check --data, --include and "
            "--max-tokens"
        )
    return kept


def _group(name: str, separator: str) -> str:
    """Separator ``__``: ``test/clowder__02-sets.tex`` belongs to ``clowder``; folders count only if it has a ``/``."""
    return (name if "/" in separator else name.rsplit("/", 1)[-1]).split(separator)[0]
