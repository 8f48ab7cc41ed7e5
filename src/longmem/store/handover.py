"""How a worker in another process gets the backbone: by its name, and where that does not lead to it, as files.

A worker encodes with the same weights, layer, number types and attention implementation as the writer; that it has the
same weights is checked by the fingerprint. Nothing is downloaded: a hub id is looked for in the worker's own cache.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from longmem.errors import BackboneError, StoreError
from longmem.store.encode import Encoder
from longmem.store.records import Layout


@dataclass(frozen=True)
class Recipe:
    """All that it takes to make an encoder like the writer's.

    Attributes:
        layout: of the store.
        batch_tokens: of the writer's encoder.
        backbone: its folder or hub id; None where ``files`` has it.
        revision: of a hub id.
        files: the backbone as ``save_pretrained`` writes it (config and safetensors), by file name.
        dtype: of its weights, a name of torch.
        attention: implementation of attention.
        quantised: its quantisation, if any.
        device: to run on.
        threads: of torch on a CPU; None leaves them.
        products: precision of float32 matrix products, as torch names it.
    """

    layout: Layout
    batch_tokens: int
    backbone: str | None
    revision: str | None
    files: dict[str, bytes] | None
    dtype: str
    attention: str | None
    quantised: Any
    device: str
    threads: int | None
    products: str

    def encoder(self) -> Encoder:
        """Load the backbone and make the encoder.

        Raises:
            BackboneError: it cannot be loaded.
            StoreError: it is another one.
        """
        from longmem.modeling.loading import load_backbone
        from longmem.modeling.training_free import TrainingFree

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(self.products)
        settings: dict[str, Any] = {} if self.attention is None else {"attn_implementation": self.attention}
        if self.quantised is not None:
            settings["device_map"] = {"": self.device}
        dtype = getattr(torch, self.dtype)
        if self.files is None:
            if not Path(self.backbone or "").is_dir():
                settings["local_files_only"] = True
            loaded = load_backbone(self.backbone or "", self.revision, dtype, quantised=self.quantised, **settings)
        else:
            with tempfile.TemporaryDirectory(prefix="longmem-") as folder:
                for name, data in self.files.items():
                    (Path(folder) / name).write_bytes(data)
                loaded = load_backbone(folder, None, dtype, quantised=self.quantised, **settings)
        model: Any = TrainingFree.from_backbone(loaded, memory_layer=self.layout.memory_layer)
        model.eval()
        if self.quantised is None:
            model.to(torch.device(self.device))
        if model.fingerprint != self.layout.fingerprint:
            raise StoreError(
                f"{self.backbone or 'the backbone sent'} loads as another backbone ({model.fingerprint}) than the "
                f"store's ({self.layout.fingerprint}); make the store's backbone available there, or use one process"
            )
        return Encoder(model, self.layout, self.batch_tokens)


class Handover:
    """The backbone of the writer's encoder, for its workers.

    Args:
        encoder: over a model of this package.

    Raises:
        StoreError: a model that cannot be given to other processes.
    """

    def __init__(self, encoder: Encoder, *, threads: int | None) -> None:
        model: Any = encoder.model
        config = model.config
        backbone: Any = getattr(getattr(model, "backbone", None), "model", None)
        if not hasattr(backbone, "save_pretrained"):
            raise StoreError(
                f"a {type(model).__name__} cannot be handed to other processes; use a LongMem over its backbone, or "
                "workers=1"
            )
        if len(set((getattr(backbone, "hf_device_map", None) or {}).values())) > 1:
            raise StoreError("a backbone that is spread over devices encodes in one process; use workers=1")
        self._backbone = backbone
        own = backbone.config
        self._named = Recipe(
            layout=encoder.layout,
            batch_tokens=encoder.batch_tokens,
            backbone=_found(own._name_or_path, config.backbone_name_or_path),
            revision=config.backbone_revision,
            files=None,
            dtype=str(backbone.dtype).removeprefix("torch."),
            attention=getattr(own, "_attn_implementation", None),
            quantised=getattr(own, "quantization_config", None),
            device=str(model.device),
            threads=threads,
            products=torch.get_float32_matmul_precision(),
        )
        self._files: Recipe | None = None
        self._guard = threading.Lock()

    @property
    def device(self) -> torch.device:
        """Of the writer's backbone."""
        return torch.device(self._named.device)

    def recipes(self, device: str) -> Iterator[Recipe]:
        """What to try, one after the other, on a worker with this device."""
        if self._named.backbone is not None:
            yield replace(self._named, device=device)
        yield replace(self._with_files(), device=device)

    def _with_files(self) -> Recipe:
        with self._guard:  # several workers may ask; it is read once
            if self._files is None:
                with tempfile.TemporaryDirectory(prefix="longmem-") as folder, _no_progress_bar():
                    try:
                        self._backbone.save_pretrained(folder)
                    except (OSError, ValueError, NotImplementedError) as error:
                        said = (str(error).splitlines() or [type(error).__name__])[0]
                        raise BackboneError(f"the backbone cannot be written for other processes ({said})") from error
                    files = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}
                self._files = replace(self._named, backbone=None, revision=None, files=files)
            return self._files


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers draws one for every file that it writes."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()


def _found(*names: str | None) -> str | None:
    """The first name that is a folder, by its whole path, as another process may stand elsewhere; else a hub id."""
    folders = [str(Path(name).absolute()) for name in names if name and Path(name).is_dir()]
    return next((name for name in (*folders, *reversed(names)) if name), None)
