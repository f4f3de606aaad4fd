"""Experiments: every arm of a comparison on the same experts, over seeds, as tables, pictures and JSON.

Light to import: torch is loaded by what runs.
"""

from __future__ import annotations

from pipelines.experiments.kind import read_experiment
from pipelines.experiments.settings import Experiment

__all__ = ["Experiment", "read_experiment"]
