"""Trains an experiment's experts and enters them in its registry, going on where an interrupted run stopped.

Knows jobs, packed folders and a registry; knows nothing of arms or of what kind the experts are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from experts.card import CARD_FILE
from experts.errors import TrainingError

if TYPE_CHECKING:
    from pipelines.train import DomainJob
    from pipelines.train.progress import Progress
    from registry import Registry

__all__ = ["train_and_register"]


def train_and_register(
    jobs: Mapping[str, Callable[[], DomainJob]],
    *,
    registry: Registry,
    out_dir: Path,
    runner: Literal["local", "ray"],
    tell: Callable[[str], None],
) -> None:
    """Train the experts that the registry does not have, and register them.

    A folder that was packed and not registered any more, because the run ended in between, is registered as it is:
    folders appear whole or not at all.

    Args:
        jobs: Makes the job, by the expert's name; called for what is to be trained only.
        registry: Has the base; receives the experts.
        out_dir: Receives the packed folders.
        runner: As in an experiment's settings.
        tell: Told what is going on.

    Raises:
        TrainingError: A job failed. The other jobs' experts are registered.
    """
    import torch

    from pipelines.train import train_jobs
    from pipelines.train.hub import raise_failures

    known = {record.name for record in registry.experts()}
    wanted = [name for name in jobs if name not in known]
    packed = [name for name in wanted if (out_dir / name / CARD_FILE).is_file()]
    for name in packed:
        registry.register(out_dir / name)
    missing = [jobs[name]() for name in wanted if name not in packed]
    if not missing:
        return
    outcomes = train_jobs(
        missing,
        out_dir=out_dir,
        registry=registry,
        runner=runner,
        threads=torch.get_num_threads(),
        progress=lambda report: tell(_describe(report)),
    )
    for outcome in outcomes:
        if outcome.folder is not None:
            registry.register(outcome.folder)
    raise_failures(outcomes)
    for outcome in outcomes:
        if outcome.folder is None:
            raise TrainingError(f"{outcome.name} ended without an expert.")


def _describe(report: Progress) -> str:
    step = report.scalars.get("step")
    position = f", step {step} of {report.scalars.get('steps')}" if step else ""
    return f"{report.name}: {report.stage}{position}"
