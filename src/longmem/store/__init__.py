"""Memory that lasts: documents as attention keys and values on disk, in many namespaces, deletable.

``MemoryStore`` (``store.py``) is the outside. ``opening``, ``adding``, ``forgetting``, ``compacting``, ``verifying``,
``repairing``, ``exporting`` and ``importing`` do what their names say with a ``Room``: the ``catalog`` (SQLite;
``schema``, ``snapshot``, ``totals``, ``migrations``, ``seal``, ``lock``), the data files (``segments``,
``precision``, ``durable``) and the ``encode``r. ``reading`` says where the chunks of some documents lie; ``bank``
searches them.
"""

from longmem.store.records import (
    CompactReport,
    DocumentInfo,
    ForgetReport,
    Layout,
    NewDocument,
    Problem,
    Progress,
    Receipt,
    Stats,
    VerifyReport,
)
from longmem.store.store import MemoryStore

__all__ = [
    "CompactReport",
    "DocumentInfo",
    "ForgetReport",
    "Layout",
    "MemoryStore",
    "NewDocument",
    "Problem",
    "Progress",
    "Receipt",
    "Stats",
    "VerifyReport",
]
