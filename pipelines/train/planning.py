"""What is known of jobs before the first process starts: that they can be trained, on what, where, and to which folder.

Knows jobs, bases and devices; reads no text and loads no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.errors import ManifestError
from pipelines.train.anchor import ResolvedBase, compute_dtype, resolve_base
from pipelines.train.finished import is_finished
from pipelines.train.job import DomainJob

if TYPE_CHECKING:
    from registry import Registry

__all__ = ["JobPlan", "Task", "check_names", "plan_jobs", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One job that is ready to start.

    Attributes:
        job: The job.
        base: The anchor.
        out: The folder that receives the packed expert.
        version: The expert's version.
        device: Where it is computed, as torch calls it: ``cpu``, ``cuda``, ``cuda:1``.
    """

    job: DomainJob
    base: ResolvedBase
    out: Path
    version: int
    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobPlan:
    """What a job would do.

    Attributes:
        name: The expert's name.
        kind: The expert's kind.
        base: The anchor's name.
        layers: Layers that are trained.
        steps: Of the optimiser.
        tokens: Trained on; None for retrievers.
        device: Where it is computed; None for a job that is done.
        dtype: What the anchor computes in; None for a job that is done.
        folder: Receives the expert.
        finished: Whether it lies there already, made of the same job and text.
    """

    name: str
    kind: str
    base: str
    layers: tuple[int, ...]
    steps: int
    tokens: int | None
    device: str | None
    dtype: str | None
    folder: Path
    finished: bool

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {**asdict(self), "layers": list(self.layers), "folder": str(self.folder)}


def check_names(jobs: Sequence[DomainJob]) -> None:
    """Refuse no job at all, and two that train one expert.

    Raises:
        ManifestError: So it is.
    """
    if not jobs:
        raise ManifestError("There is no job to train. Name one job file at least.")
    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ManifestError(f"Several jobs train {', '.join(twice)}. Give each expert a name of its own.")


def prepare(
    jobs: Sequence[DomainJob], *, out_dir: Path, registry: Registry | None, stack: ExitStack
) -> list[Task]:
    """Check everything that can be known before the first process starts.

    Args:
        jobs: Whose experts are not there yet.
        out_dir: Receives ``owner/expert`` for each job.
        registry: Where base names are looked up, and the next version numbers.
        stack: Keeps the bases at hand.

    Raises:
        CoterieError: A job's device, base, layers, card or output folder is not usable.
    """
    from pipelines.train.worker import check_device, check_job

    devices = [str(check_device(job)) for job in jobs]
    bases: dict[str, ResolvedBase] = {}
    tasks = []
    for job, device in zip(jobs, devices, strict=True):
        if job.base not in bases:
            bases[job.base] = stack.enter_context(resolve_base(job.base, registry=registry))
        out = out_dir.absolute() / job.name
        version = registry.next_version(job.name) if registry else 1
        check_job(job, base=bases[job.base], version=version, out=out)
        tasks.append(Task(job=job, base=bases[job.base], out=out, version=version, device=device))
    return tasks


def plan_jobs(jobs: Sequence[DomainJob], *, out_dir: Path, registry: Registry | None = None) -> list[JobPlan]:
    """Say what `pipelines.train.hub.train_jobs` would do; nothing is started or written.

    Args:
        jobs: As for `train_jobs`.
        out_dir: As for `train_jobs`.
        registry: As for `train_jobs`.

    Raises:
        CoterieError: As `train_jobs` before anything starts.
    """
    check_names(jobs)
    finished = [job for job in jobs if is_finished(job, out=out_dir / job.name)]
    with ExitStack() as stack:
        pending = [job for job in jobs if job not in finished]
        tasks = prepare(pending, out_dir=out_dir, registry=registry, stack=stack)
        devices = {task.job.name: (task.device, _dtype(task)) for task in tasks}
        plans = []
        for job in jobs:
            base = stack.enter_context(resolve_base(job.base, registry=registry))
            device, dtype = devices.get(job.name, (None, None))
            plans.append(
                JobPlan(
                    name=job.name,
                    kind=job.kind,
                    base=base.ref.name,
                    layers=job.layer_numbers(base.description.num_layers),
                    steps=job.steps,
                    tokens=None if job.retrieval else job.steps * job.batch_size * job.sequence_length,
                    device=device,
                    dtype=dtype,
                    folder=out_dir / job.name,
                    finished=job in finished,
                )
            )
    return plans


def _dtype(task: Task) -> str:
    import torch

    if task.job.retrieval is not None:
        return "float32"
    return task.job.dtype or compute_dtype(task.base.description, torch.device(task.device))
