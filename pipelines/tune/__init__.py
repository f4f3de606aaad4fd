"""Tuning: trains routers, the trunk or everything of a composed model on a mix of texts.

Light to import: torch is loaded by what runs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pipelines.tune.job import TextSource, TuneJob

if TYPE_CHECKING:
    from pipelines.tune.planning import TuningPlan, plan_tuning
    from pipelines.tune.tuning import Tuned, tune

__all__ = ["TextSource", "TuneJob", "Tuned", "TuningPlan", "plan_tuning", "tune"]


_HOME = {
    "Tuned": "pipelines.tune.tuning",
    "TuningPlan": "pipelines.tune.planning",
    "plan_tuning": "pipelines.tune.planning",
    "tune": "pipelines.tune.tuning",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pipelines.tune' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
