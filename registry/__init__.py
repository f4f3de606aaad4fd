"""Which experts exist, who owns them, whether they are intact, and who has withdrawn.

Knows cards and files; knows no torch and not what tensors mean. Names are imported on first use, so that
``import registry`` is instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from registry.records import (
        AuditEntry,
        AuditHead,
        BaseRecord,
        ConsentRecord,
        ExpertRecord,
        FileCheck,
        FsckReport,
        OptOut,
        VerifyReport,
    )
    from registry.store import Registry, default_path

__all__ = [
    "AuditEntry",
    "AuditHead",
    "BaseRecord",
    "ConsentRecord",
    "ExpertRecord",
    "FileCheck",
    "FsckReport",
    "OptOut",
    "Registry",
    "VerifyReport",
    "default_path",
]

_IN_STORE = {"Registry", "default_path"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'registry' has no attribute '{name}'")
    return getattr(
        importlib.import_module("registry.store" if name in _IN_STORE else "registry.records"), name
    )


def __dir__() -> list[str]:
    return __all__
