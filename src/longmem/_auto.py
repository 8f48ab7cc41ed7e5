"""Make transformers' Auto classes know our models without importing transformers for those who only ``import longmem``.

``longmem.modeling.alibi_gpt`` and ``.longmem`` register their models when they are imported. What is arranged here is
*when*: at once where the Auto classes are loaded already, otherwise right after somebody loads them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.modeling_auto"


def register_with_transformers() -> None:
    """Register our models now, or as soon as the Auto classes exist."""
    if AUTO_CLASSES in sys.modules:
        _import_our_models()
    else:
        sys.meta_path.insert(0, _AfterAutoClasses())


def register_if_loaded() -> None:
    """Register what had to wait for the end of an import of ours, the one that brought the Auto classes."""
    if AUTO_CLASSES in sys.modules:
        _import_our_models()


def _import_our_models() -> None:
    import_module("longmem.modeling.alibi_gpt")  # needs nothing else of ours, so it can be imported at any moment
    # LongMem needs most of the package. While a part of that is being imported, modules are half made, and that import
    # reaches ``modeling.longmem`` by itself if it has to do with models.
    if not any(_unfinished(module) for name, module in list(sys.modules.items()) if name.startswith("longmem.")):
        import_module("longmem.modeling.longmem")


def _unfinished(module: ModuleType | None) -> bool:
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


class _AfterAutoClasses(MetaPathFinder):
    """Answers for one module only, and with that module's own loader plus one call after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CLASSES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        _import_our_models()
