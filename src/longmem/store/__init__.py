"""Memory that lasts: documents as attention keys and values on disk, in many namespaces, deletable.

``MemoryStore`` (``store.py``) is the outside. Its parts share the ``catalog`` (SQLite, and the data files) and the
``encode``r. ``adding`` and ``upkeep`` (compact, verify, export, import) change it; ``bank`` is searched.
docs/memory-format.md describes every byte.
"""

from longmem.store.adding import Receipt
from longmem.store.catalog import DocumentInfo
from longmem.store.disk import Progress
from longmem.store.encode import NewDocument
from longmem.store.store import MemoryStore

__all__ = ["DocumentInfo", "MemoryStore", "NewDocument", "Progress", "Receipt"]
