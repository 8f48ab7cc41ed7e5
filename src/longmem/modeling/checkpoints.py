"""Our checkpoints: made over a backbone, saved and loaded; and which model a folder, file or hub id is.

Each failure is one line.
"""

from __future__ import annotations

import copy
import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
from huggingface_hub import save_torch_state_dict, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from longmem.config import CONFIGS, LongMemGenerationConfig, MemoryConfig
from longmem.errors import BackboneError, CheckpointError, ConfigError, first_line
from longmem.files import to_disk
from longmem.modeling.backbone import Backbone
from longmem.modeling.loading import gguf_folder, given_backbone, how_to_load, is_gguf, load_backbone
from longmem.modeling.weights import fingerprint_of, legacy_fingerprint, same_weights, sketch_of

CHANGEABLE = ("recency", "num_retrieved", "chunk_size", "memory_size", "memory_temperature")
"""Settings that any trained model can be read with."""
_DAMAGED = (OSError, SafetensorError, ValueError, TypeError, KeyError, AttributeError)  # what reading one then raises
_FINDING = ("subfolder", "gguf_file", "variant")  # where a backbone is; kept in a checkpoint's config


class Checkpointed(PreTrainedModel):
    """The part of ``MemoryLM`` that makes, saves and loads: a checkpoint has what was trained, and names the rest."""

    config_class: type[MemoryConfig] = MemoryConfig
    weights_file: ClassVar[str] = ""  # what a checkpoint keeps ``own_weights`` in
    weights_prefix: ClassVar[str] = ""  # of their names in ``state_dict``; the file leaves it out
    backbone: Backbone

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | PreTrainedModel | nn.Module,
        *,
        memory_layers: int | Sequence[int] | Callable[[PreTrainedModel], Sequence[int] | None] | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        side_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> Self:
        """The model over a frozen backbone, which it uses itself and does not copy.

        Args:
            backbone: hub id, folder, ``.gguf`` file, or an already loaded causal language model (peft's too).
            memory_layers: 0-based, or a function of the loaded backbone that chooses them
                (``evaluation.layers.best_layers``); None is three quarters of the depth. ``memory_layer`` is another
                name for one layer.
            revision: hub revision of the backbone.
            dtype: of the backbone; None keeps that of its checkpoint.
            side_dtype: of a ``LongMem``'s SideNet; None is the backbone's.
            **settings: fields of the model's config; all others are arguments of
                ``AutoModelForCausalLM.from_pretrained``, such as ``device_map``, ``attn_implementation`` or
                ``quantization_config``.

        Raises:
            BackboneError: if the backbone cannot be loaded or used.
            ConfigError: if settings contradict each other, or there is none of that name.
        """
        memory_layers = settings.pop("memory_layer", None) if memory_layers is None else memory_layers
        own = cls.config_class.settings_among(settings)
        dtype, how = how_to_load(settings, dtype)
        if isinstance(memory_layers, str):
            raise ConfigError(
                f"memory_layers ({memory_layers!r}) must be layers, or a function that chooses them; "
                '"auto" is measured on text: longmem.evaluation.layers.best_layers, or a recipe'
            )
        if isinstance(backbone, nn.Module):
            model = given_backbone(backbone, dtype, how)
            name = _absolute(model.config._name_or_path) or None
        else:
            name = _absolute(str(backbone))
            model = load_backbone(name, revision, dtype, **how)
        layers: Any = memory_layers(model) if callable(memory_layers) else memory_layers
        made = cls.config_class(
            backbone_config=model.config,
            backbone_name_or_path=name,
            backbone_revision=revision,
            backbone_kwargs={key: value for key, value in how.items() if key in _FINDING},
            memory_layers=layers,
            **own,
        )
        return cls(made, model, **({} if side_dtype is None else {"side_dtype": side_dtype}))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        backbone: str | Path | nn.Module | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
        side_dtype: torch.dtype | None = None,
        config: MemoryConfig | None = None,
        **kwargs: Any,
    ) -> Self:
        """Load a checkpoint, and the backbone that it names; in eval mode.

        Args:
            pretrained_model_name_or_path: folder written by ``save_pretrained``, or a hub id.
            backbone: path or model to use in place of the one named. The same weights in another precision are taken
                with a warning, other weights are refused.
            revision: of a hub id.
            dtype, side_dtype: as in ``from_backbone``.
            config: in place of the one in the folder.
            **kwargs: ``recency``, ``num_retrieved``, ``chunk_size``, ``memory_size`` or ``memory_temperature`` in place
                of what the checkpoint says; all others are arguments of ``AutoModelForCausalLM.from_pretrained`` for
                the backbone.

        Raises:
            CheckpointError: if the checkpoint is incomplete or damaged, or belongs to another backbone.
            BackboneError: if the backbone cannot be loaded.
            ConfigError: if a setting is given that belongs to the trained weights, or breaks a rule.
        """
        changed = cls.config_class.settings_among(kwargs)
        if fixed := sorted(changed.keys() - set(CHANGEABLE)):
            raise ConfigError(
                f"{fixed[0]} ({changed[fixed[0]]!r}) cannot be changed in a trained model, only "
                f"{', '.join(CHANGEABLE)}; leave it out, or make a new model with {cls.__name__}.from_backbone"
            )
        dtype, how = how_to_load(kwargs, dtype)
        folder = resolve_folder(str(pretrained_model_name_or_path), revision)
        try:
            if config is None and not (folder / "config.json").is_file():  # transformers would take the defaults
                raise FileNotFoundError(f"no config.json in {folder}")
            settings = cls.config_class.from_pretrained(folder) if config is None else copy.deepcopy(config)
            kind = "" if config is not None else model_type(str(folder))
            if kind and kind != cls.config_class.model_type:
                raise ValueError(f"its config.json is that of a {kind} model")
            tensors = _read_weights(folder / cls.weights_file)
        except _DAMAGED as problem:
            raise CheckpointError(
                f"{folder} is not a complete {cls.__name__} checkpoint ({first_line(problem)}); it needs config.json "
                f"and {cls.weights_file} as written by save_pretrained"
            ) from problem
        settings.update(changed)
        if problems := settings.problems():
            raise ConfigError(problems)
        base, fingerprint = _load_backbone_of(settings, folder, backbone, dtype, how)
        side = {} if side_dtype is None else {"side_dtype": side_dtype}
        model = cls(settings, base, fingerprint=fingerprint, **side)
        model._take(tensors, folder / cls.weights_file)
        if (folder / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = LongMemGenerationConfig.from_pretrained(folder)
        model.train(False)
        return model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        movable: bool = False,
        is_main_process: bool = True,
        safe_serialization: bool = True,
    ) -> None:
        """Write what was trained alone, and config.json, which names the backbone and its fingerprint.

        config.json makes the folder a checkpoint: it is deleted first and written last, so a save that is cut short,
        also one over an older checkpoint, is not taken for one.

        Args:
            save_directory: the folder.
            state_dict: weights to write in place of the model's own, by their names in it: those gathered from the
                processes among which they are divided.
            max_shard_size: bytes, or text such as ``"200MB"``, from which on weights are written to several files
                (sidenet-00001-of-0000N.safetensors) with an index.
            movable: name a backbone that is a folder relative to this one, so that both can move together.
            is_main_process, safe_serialization: what transformers passes by itself; they change nothing.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
        self.write_weights(folder, state_dict or {}, max_shard_size)
        self._index_for_trainer(folder)
        if self.generation_config is not None:
            self.generation_config.save_pretrained(folder)
        config = self.saved_config()
        for name in ("backbone_name_or_path", "start_name_or_path") if movable else ():
            named = getattr(config, name, None)
            if named and os.path.isabs(named) and os.path.isdir(named):
                setattr(config, name, os.path.relpath(named, folder))
        config.save_pretrained(folder)

    def own_weights(self) -> dict[str, Tensor]:
        """What a checkpoint has beside its settings, by the names in its file: nothing of a frozen backbone."""
        own = (pair for pair in self.state_dict().items() if pair[0].startswith(self.weights_prefix))
        return {name.removeprefix(self.weights_prefix): tensor for name, tensor in own}

    def write_weights(self, folder: Path, given: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        """Write what was trained, to the disk; ``given`` is in place of the model's own, by names in ``state_dict``."""
        own = {n: given.get(n, given.get(f"{self.weights_prefix}{n}", t)) for n, t in self.own_weights().items()}
        if not own:
            (folder / self.weights_file).unlink(missing_ok=True)  # of an earlier save
            return
        stem = Path(self.weights_file).stem
        save_torch_state_dict(
            own,
            folder,
            filename_pattern=f"{stem}{{suffix}}.safetensors",
            max_shard_size=max_shard_size,
            metadata={"backbone_fingerprint": str(self.config.backbone_fingerprint)},
        )
        for path in (*folder.glob(f"{stem}*"), folder):
            to_disk(path)

    def weight_files(self, folder: Path) -> list[Path]:
        """The files of a checkpoint that ``write_weights`` has written."""
        return sorted(folder.glob(f"{Path(self.weights_file).stem}*.safetensors"))

    def _index_for_trainer(self, folder: Path) -> None:
        """Say which file has which weight of the model, so that a plain ``transformers.Trainer`` can resume."""
        weight_map, own = {}, dict(self.named_parameters(recurse=False))
        for file in self.weight_files(folder):
            with safe_open(file, "pt") as tensors:
                for name in list(tensors.keys()):
                    weight_map[name if name in own else f"{self.weights_prefix}{name}"] = str(file.relative_to(folder))
        if weight_map:
            index = json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2, sort_keys=True)
            (folder / "model.safetensors.index.json").write_text(index + "\n", encoding="utf-8")

    def saved_config(self) -> MemoryConfig:
        """The settings as a checkpoint has them, with a sketch of the backbone."""
        config = copy.deepcopy(self.config)
        config.architectures = [type(self).__name__]
        # of weights that are divided among processes it was taken before, see `training.models.shard`
        if not any(hasattr(weight, "full_tensor") for weight in self.backbone.model.parameters()):
            config.backbone_sketch = sketch_of(self.backbone.model)
        return cast(MemoryConfig, config)

    @torch.no_grad()
    def _take(self, tensors: Mapping[str, Tensor], file: Path) -> None:
        own = self.own_weights()
        missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
        other = [name for name, tensor in tensors.items() if name in own and own[name].shape != tensor.shape]
        if missing or unexpected or other:
            raise CheckpointError(
                f"{file} does not fit its config: missing {missing[:3]}, unexpected {unexpected[:3]}, of another shape "
                f"{other[:3]}; the checkpoint is incomplete, damaged or of another version"
            )
        for name, tensor in tensors.items():
            own[name].copy_(tensor)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Also takes the names in the files of a checkpoint, as ``transformers.Trainer`` hands them over."""
        known = self.state_dict().keys()
        named = {name if name in known else f"{self.weights_prefix}{name}": value for name, value in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)


def _read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of the file or of the several that stand for it (``name-00001-of-0000N``)."""
    files = [file] if file.is_file() else sorted(file.parent.glob(f"{file.stem}-*.safetensors"))
    return {name: tensor for each in files for name, tensor in load_file(each).items()}


def _load_backbone_of(
    config: MemoryConfig,
    folder: Path,
    given: str | Path | nn.Module | None,
    dtype: torch.dtype | None,
    how: dict[str, Any],
) -> tuple[PreTrainedModel, str]:
    """The backbone of a checkpoint in ``folder``, or the one ``given``, and the fingerprint by which it goes there.

    The config's name of the backbone becomes one that holds from anywhere.
    """
    if isinstance(given, nn.Module):
        model = given_backbone(given, dtype, how)
        return model, _recognised(model, config, folder, True)
    name = _absolute(named_backbone(config.backbone_name_or_path, folder) if given is None else str(given))
    quantised = getattr(config.backbone_config, "quantization_config", None)
    # the fingerprint is that of the stored weights, so they are cast afterwards, if quantisation or device_map let them
    early = dtype if how.get("device_map") is not None or quantised is not None else None
    revision, found_by = (config.backbone_revision, config.backbone_kwargs) if given is None else (None, {})
    model = load_backbone(name, revision, early, quantised=quantised, **{**found_by, **how})
    config.backbone_name_or_path = name
    fingerprint = _recognised(model, config, folder, given is not None)
    return model if early is dtype else nn.Module.to(model, dtype), fingerprint


def _recognised(model: PreTrainedModel, config: MemoryConfig, folder: Path, given: bool) -> str:
    """The fingerprint that the checkpoint knows its backbone by; another backbone is refused."""
    expected, own = config.backbone_fingerprint, fingerprint_of(model)
    if expected is None or expected in (own, legacy_fingerprint(model)):
        return expected or own
    if config.backbone_config is not None and expected == legacy_fingerprint(model, config.backbone_config):
        return expected
    if given and config.backbone_sketch is not None and same_weights(config.backbone_sketch, sketch_of(model)):
        warnings.warn(
            f"{folder} was made over backbone {expected} ({config.backbone_name_or_path}); the backbone given, {own} "
            f"({model.config._name_or_path or 'a loaded model'}, {model.dtype}), has the same weights in another "
            "precision and is taken for it",
            stacklevel=4,
        )
        return expected
    raise CheckpointError(
        f"{folder} was made over backbone {expected} ({config.backbone_name_or_path}), this one is {own}; pass the "
        "backbone that it names, or make the checkpoint again if it is damaged or of two runs"
    )


def _absolute(name: str) -> str:
    """A folder's or file's path from the root, so that it holds wherever the process goes; hub ids stay."""
    return os.path.abspath(name) if os.path.exists(name) else name


def named_backbone(named: str | None, folder: Path) -> str:
    """Where a checkpoint in ``folder`` says its backbone is; a path may be relative to the folder."""
    if named is None:
        raise BackboneError(f"{folder} names no backbone; pass backbone=PATH or a loaded model")
    if not Path(named).is_absolute() and (folder / named).is_dir():
        return str(folder / named)
    return named


def resolve_folder(name: str, revision: str | None) -> Path:
    """The local folder of a checkpoint; a hub id is downloaded."""
    folder = Path(name)
    if folder.is_dir():
        return folder.absolute()
    try:
        return Path(snapshot_download(name, revision=revision))
    except Exception as problem:
        raise CheckpointError(
            f"{name} is neither a folder written by save_pretrained nor a hub id that can be reached "
            f"({first_line(problem)})"
        ) from problem


# what a name stands for


def checked_device(device: str) -> str:
    """The same name; ``auto`` is ``cuda`` where there is a GPU and else ``cpu``.

    Raises:
        ConfigError: torch has no such device, or none on this machine.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device ({device}) cannot be used ({first_line(error)}); try --device cpu") from error
    return device


def checkpoint_folder(path: str, kind: str | None = None, otherwise: str = "") -> str:
    """The folder with the model: a run folder stands for its ``final/``, a GGUF file for what it is converted to.

    A hub id stays as it is.

    Raises:
        CheckpointError: the folder holds no model, or one that is not of this kind (see ``model_type``).
    """
    folder, where = Path(path), path
    if is_gguf(path):
        where = str(gguf_folder(path))
    elif folder.exists():
        there = [str(each) for each in (folder, folder / "final") if (each / "config.json").is_file()]
        if not there:
            missing = "no model here (no config.json in it or in its final/); is the training finished?"
            raise CheckpointError(f"{path}: {missing}")
        where = there[0]
    elif path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise CheckpointError(f"{path}: no such folder; name a checkpoint folder, a run folder or a hub id")
    if kind is not None and model_type(where) != kind:
        raise CheckpointError(f"{where}: {otherwise}")
    return where


def tokenizer_beside(*places: str) -> str:
    """The first of these places with a tokenizer's files; else the last, which may be a hub id."""
    files = ("tokenizer.json", "tokenizer_config.json", "vocab.json")
    there = (place for place in places if any((Path(place) / file).is_file() for file in files))
    return next(there, places[-1])


def model_type(where: str) -> str:
    """``model_type`` of the config in a folder or at a hub id; empty where it has none.

    Raises:
        CheckpointError: there is no config that can be read.
    """
    try:
        return str(PreTrainedConfig.get_config_dict(where)[0].get("model_type", ""))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        file = Path(where) / "config.json"
        if file.is_file():
            said = f"{file}: no JSON object ({first_line(error)}); the checkpoint is damaged, write it again"
        else:
            said = f"{where}: neither a folder nor a hub id that can be reached ({first_line(error)})"
        raise CheckpointError(said) from error


def backbone_of(where: str) -> tuple[str, str | None]:
    """Name and revision of the backbone of a checkpoint; a causal language model is its own.

    Raises:
        BackboneError: the checkpoint does not say.
        CheckpointError: its config is damaged.
    """
    kind = model_type(where)
    if kind not in CONFIGS:
        return where, None
    try:
        config: Any = CONFIGS[kind].from_pretrained(where)
    except _DAMAGED as problem:
        said = f"{where}: its config.json is damaged ({first_line(problem)}); write the checkpoint again"
        raise CheckpointError(said) from problem
    started = kind == "memtrm"  # its own backbone is the one that it trained
    name = config.start_name_or_path if started else config.backbone_name_or_path
    return named_backbone(name, resolve_folder(where, None)), None if started else config.backbone_revision
