"""The sealed part of a run: reads the owner's text, trains, and lets numbers out.

Runs in a worker process of the owner's Ray. Knows the request it is given as JSON; knows nothing of Ray.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.train.anchor import ResolvedBase
from pipelines.train.job import DomainJob
from pipelines.train.progress import Progress
from pipelines.train.sealed import SealedResult, sealed

__all__ = ["TaskRequest", "run_sealed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRequest:
    """Everything a task is told, as plain text: no code, no pickled object.

    Attributes:
        job: The `DomainJob` as JSON.
        base: The `ResolvedBase` as JSON.
        out: Where the packed expert goes: a folder of the owner's.
        version: The expert's version.
        threads: Threads for the arithmetic.
        reports: File that progress lines are appended to, in the owner's temporary folder.
        stop: When this file exists, the task stores a checkpoint and stops.
    """

    job: str
    base: str
    out: str
    version: int
    threads: int
    reports: str
    stop: str

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))


def run_sealed(payload: str) -> SealedResult:
    """Train as ``payload`` (a `TaskRequest`) says; printed text and errors go to the owner's log."""
    request = TaskRequest(**json.loads(payload))
    job = DomainJob.model_validate_json(request.job)
    return sealed(lambda: _train(job, request), log=job.log_path)


def _train(job: DomainJob, request: TaskRequest) -> Mapping[str, int | float]:
    from pipelines.train.worker import train_job

    scalars: Mapping[str, int | float] = {}
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    reports = os.open(request.reports, flags, 0o600)

    def report(progress: Progress) -> None:
        nonlocal scalars
        scalars = progress.scalars
        os.write(reports, progress.to_line().encode())
        if Path(request.stop).exists():
            raise KeyboardInterrupt

    try:
        train_job(
            job,
            out=Path(request.out),
            base=ResolvedBase.from_json(request.base),
            version=request.version,
            progress=report,
            threads=request.threads,
        )
    finally:
        os.close(reports)
    return scalars
