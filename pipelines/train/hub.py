"""Runs jobs of one or several owners and gathers what they may say: the experts' folders and a few numbers.

Knows processes, pipes and the allow-list; never opens an owner's text. With Ray each owner has a process and a
Ray of its own; locally the jobs run here, one after the other.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from experts.errors import CoterieError, StartError, TrainingError
from pipelines.train.finished import is_finished, mark_finished
from pipelines.train.job import DomainJob
from pipelines.train.planning import Task, check_names, prepare
from pipelines.train.progress import Progress, ProgressFn, error_name

if TYPE_CHECKING:
    from registry import Registry

__all__ = ["JobOutcome", "raise_failures", "train_jobs"]

_STOP_SECONDS = 30.0
"""How long agents may take to store checkpoints and stop their Ray before they are killed."""


_NOT_STARTED = (
    "Ray did not start in time. Try again when the machine is less busy, with fewer owners at once, or one job after "
    "the other without Ray (--local)."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """How one job ended.

    Attributes:
        name: The expert's name.
        folder: The packed expert, ready for `Registry.register`; None if there is none.
        error: Class name of what went wrong.
        message: What went wrong, where the job ran in this process or never began; None where it ran sealed.
        log: The owner's full log.
        final: The last report.
        device: Where it was computed; None where the expert was there already.
    """

    name: str
    folder: Path | None
    error: str | None
    message: str | None
    log: Path
    final: Progress
    device: str | None = None


def raise_failures(outcomes: Sequence[JobOutcome]) -> None:
    """Raise one `TrainingError` for all jobs that failed, if any did."""
    failed = [outcome for outcome in outcomes if outcome.error]
    if failed:
        raise TrainingError(
            f"{len(failed)} of {len(outcomes)} jobs failed.",
            problems=[
                f"{outcome.name}: {outcome.message or f'{outcome.error}; the owner reads {outcome.log}'}"
                for outcome in failed
            ],
        )


def train_jobs(
    jobs: Sequence[DomainJob],
    *,
    out_dir: Path,
    registry: Registry | None = None,
    runner: Literal["ray", "local"] = "ray",
    progress: ProgressFn | None = None,
    threads: int | None = None,
) -> list[JobOutcome]:
    """Train every job; one that fails does not stop the others.

    A job whose expert lies in ``out_dir`` already, made of the same text, is not trained again: after an
    interruption the same call goes on where it stopped.

    Args:
        jobs: Of any number of owners.
        out_dir: Receives ``owner/expert`` for each job.
        registry: Where base names are looked up, and the next version numbers.
        runner: ``ray``: a process and a Ray for each owner, side by side; ``local``: here, one after the other.
        progress: Called with every report, in this thread.
        threads: Threads of each owner; by default the cores are shared out.

    Returns:
        One outcome a job, in their order.

    Raises:
        CoterieError: Before anything starts: a job's device, base, layers, card or output folder is not usable.
        KeyboardInterrupt: After all agents have stored checkpoints and stopped.
    """
    with ExitStack() as stack:
        check_names(jobs)
        finished = [job for job in jobs if is_finished(job, out=out_dir / job.name)]
        kept = [_kept(job, out_dir=out_dir, progress=progress) for job in finished]
        pending = [job for job in jobs if job not in finished]
        tasks = prepare(pending, out_dir=out_dir, registry=registry, stack=stack)
        if runner == "local":
            trained = [_run_here(task, progress=progress, threads=threads) for task in tasks]
        else:
            trained = _run_agents(tasks, progress=progress, threads=threads)
    outcomes = {outcome.name: outcome for outcome in [*kept, *trained]}
    return [outcomes[job.name] for job in jobs]


def _kept(job: DomainJob, *, out_dir: Path, progress: ProgressFn | None) -> JobOutcome:
    final = Progress(name=job.name, stage="done")
    if progress:
        progress(final)
    return JobOutcome(
        name=job.name,
        folder=out_dir.absolute() / job.name,
        error=None,
        message=None,
        log=job.log_path,
        final=final,
    )


def _run_here(task: Task, *, progress: ProgressFn | None, threads: int | None) -> JobOutcome:
    from pipelines.train.worker import train_job

    latest = Progress(name=task.job.name)

    def keep(report: Progress) -> None:
        nonlocal latest
        latest = report
        if progress:
            progress(report)

    error: Exception | None = None
    try:
        train_job(
            task.job, out=task.out, base=task.base, version=task.version, progress=keep, threads=threads
        )
        mark_finished(task.job, out=task.out)
    except CoterieError as failure:
        error = failure
        keep(Progress(name=task.job.name, stage="failed", error=error_name(failure)))
    except KeyboardInterrupt:
        keep(Progress(name=task.job.name, stage="stopped"))
        raise
    return JobOutcome(
        name=task.job.name,
        folder=None if error else task.out,
        error=error_name(error) if error else None,
        message=str(error) if error else None,
        log=task.job.log_path,
        final=latest,
        device=task.device,
    )


@dataclass(slots=True, kw_only=True)
class _Agent:
    """The hub's side of one owner's process."""

    tasks: list[Task]
    folder: Path
    process: subprocess.Popen[bytes]
    latest: list[Progress]
    buffer: bytes = b""
    problems: list[str] = field(default_factory=list)

    def feed(self, data: bytes) -> Iterator[Progress]:
        """Reports in newly read bytes; a line that is not on the lists is dropped and the agent distrusted."""
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            number, _, body = line.partition(b" ")
            try:
                index = int(number) if number.isdigit() else len(self.tasks)
                report = Progress.from_line(body, name=self.tasks[index].job.name)
            except (ValueError, IndexError):
                self.problems.append("ValueError")
                continue
            self.latest[index] = report
            yield report

    def tell_to_stop(self) -> None:
        """Ask for a checkpoint and an orderly end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"stop\n")
            self.process.stdin.flush()
        except (BrokenPipeError, ValueError):
            return

    def end(self, *, deadline: float) -> None:
        """Wait for the process until the deadline, kill what is left, remove its temporary folder."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        self._sweep()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _sweep(self) -> None:
        """Kill what is left of the agent's session; an orderly end leaves nothing, a killed agent may."""
        for pid in psutil.pids():
            try:
                if os.getsid(pid) == self.process.pid:
                    os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def _by_owner(tasks: Sequence[Task]) -> dict[str, list[Task]]:
    owners: dict[str, list[Task]] = {}
    for task in tasks:
        owners.setdefault(task.job.owner, []).append(task)
    return owners


def _run_agents(
    tasks: Sequence[Task], *, progress: ProgressFn | None, threads: int | None
) -> list[JobOutcome]:
    if not tasks:
        return []
    owners = _by_owner(tasks)
    share = threads or max(1, (os.cpu_count() or 1) // len(owners))
    agents: list[_Agent] = []
    with _stopping(agents, progress=progress):
        for owned in owners.values():
            agents.append(_start_agent(owned, threads=share))
        _listen(agents, progress=progress)
    outcomes = {outcome.name: outcome for agent in agents for outcome in _outcomes(agent)}
    return [outcomes[task.job.name] for task in tasks]


def _start_agent(tasks: list[Task], *, threads: int) -> _Agent:
    # a short name directly under the temporary folder: Ray's sockets live below it, and a socket's path may
    # not exceed 107 bytes
    folder = Path(tempfile.mkdtemp(prefix="coterie-"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.train.agent"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    request = {
        "orders": [
            {
                # the device as it was found, so that the owner's processes mean the same one
                "job": task.job.model_copy(update={"device": task.device}).model_dump_json(),
                "base": task.base.to_json(),
                "out": str(task.out),
                "version": task.version,
            }
            for task in tasks
        ],
        "folder": str(folder),
        "threads": threads,
    }
    agent = _Agent(
        tasks=tasks,
        folder=folder,
        process=process,
        latest=[Progress(name=task.job.name) for task in tasks],
    )
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        agent.problems.append("BrokenPipeError")
    return agent


@contextmanager
def _stopping(agents: list[_Agent], *, progress: ProgressFn | None) -> Iterator[None]:
    """End every agent with the block, however it ends; interrupted, give them time for a checkpoint."""
    try:
        yield
    finally:
        for agent in agents:
            if agent.process.poll() is None:
                agent.tell_to_stop()
        deadline = time.monotonic() + _STOP_SECONDS
        try:
            _listen(agents, progress=progress, deadline=deadline)
        finally:
            for agent in agents:
                agent.end(deadline=deadline)


def _listen(agents: Sequence[_Agent], *, progress: ProgressFn | None, deadline: float = math.inf) -> None:
    """Pass reports on until every agent has closed its pipe, or the deadline."""
    with selectors.DefaultSelector() as selector:
        for agent in agents:
            assert agent.process.stdout is not None
            selector.register(agent.process.stdout, selectors.EVENT_READ, agent)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(timeout=None if math.isinf(left) else left):
                agent = key.data
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                for report in agent.feed(data):
                    if progress:
                        progress(report)


def _outcomes(agent: _Agent) -> Iterator[JobOutcome]:
    for task, final in zip(agent.tasks, agent.latest, strict=True):
        done = final.stage == "done" and not agent.problems and task.out.is_dir()
        log, begun = task.job.log_path, final.error != StartError.__name__
        error = None if done else final.error or (agent.problems or [TrainingError.__name__])[0]
        yield JobOutcome(
            name=task.job.name,
            folder=task.out if done else None,
            error=error,
            message=None if begun else _NOT_STARTED,
            log=log if begun and log.exists() else agent.tasks[0].job.agent_log_path,
            final=final,
            device=task.device,
        )
