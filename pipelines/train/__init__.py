"""Training one owner's expert where the owner's text is, and nothing of that text anywhere else.

Light on import: `train_job`, `train_jobs` and `public_routing` are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.train.hub import train_jobs
    from pipelines.train.job import DomainJob
    from pipelines.train.routing import public_routing
    from pipelines.train.worker import train_job

__all__ = ["DomainJob", "public_routing", "train_job", "train_jobs"]

_HOMES = {
    "DomainJob": "pipelines.train.job",
    "public_routing": "pipelines.train.routing",
    "train_job": "pipelines.train.worker",
    "train_jobs": "pipelines.train.hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines.train' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
