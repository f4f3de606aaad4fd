"""An owner's agent: the process that runs this owner's jobs in a Ray of the owner's own and reports numbers.

Started by the hub with ``python -m pipelines.train.agent``; reads one request from its standard input and
writes allow-listed lines to its standard output. It ends when the jobs are done, when it is told to stop, or
when the hub is gone, and takes every process of its Ray with it. A signed request and a policy file of the
owner's would be checked in `_accept`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from experts.errors import TrainingError
from pipelines.devices import is_gpu
from pipelines.train.agent_task import TaskRequest
from pipelines.train.anchor import ResolvedBase
from pipelines.train.finished import mark_finished
from pipelines.train.job import DomainJob
from pipelines.train.progress import Progress, error_name
from pipelines.train.sealed import SealedResult, private_log

if TYPE_CHECKING:
    from pipelines.train.ray_runner import OwnerRay

__all__ = ["Order", "main", "release"]

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 15.0
"""How long a stopped task may take to store its checkpoint."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One job of the request: what to train, on which base, and where the expert is to be delivered."""

    job: DomainJob
    base: ResolvedBase
    out: Path
    version: int


def _accept(request: Mapping[str, object]) -> tuple[list[Order], Path, int]:
    """Read the hub's request: the orders, the temporary folder, the number of threads."""
    orders = request["orders"]
    assert isinstance(orders, list)
    bases = {text: ResolvedBase.from_json(text) for text in {order["base"] for order in orders}}
    accepted = [
        Order(
            job=DomainJob.model_validate_json(order["job"]),
            base=bases[order["base"]],
            out=Path(order["out"]),
            version=int(order["version"]),
        )
        for order in orders
    ]
    return accepted, Path(str(request["folder"])), int(str(request["threads"]))


def main() -> None:
    """Serve the request on standard input."""
    _close_doors()
    hub = os.fdopen(os.dup(1), "wb", buffering=0)
    orders, folder, threads = _accept(json.loads(sys.stdin.buffer.readline()))
    stop = _watch_hub(sys.stdin.buffer, mark=folder / "stop")
    try:
        with private_log(orders[0].job.agent_log_path):
            _serve(orders, hub=hub, folder=folder, threads=threads, stop=stop)
    finally:
        _end_children()
        shutil.rmtree(folder, ignore_errors=True)


def _close_doors() -> None:
    """Files for the owner only, no core dumps, no interrupt from a terminal, orphans come back to this process."""
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _watch_hub(pipe: BinaryIO, *, mark: Path) -> threading.Event:
    """Set the event, and leave a mark for the running task, when the hub says stop or is gone."""
    stop = threading.Event()

    def watch() -> None:
        pipe.readline()  # "stop", or nothing at all when the hub has died
        stop.set()
        if mark.parent.is_dir():
            mark.touch()

    threading.Thread(target=watch, daemon=True).start()
    return stop


def _serve(orders: list[Order], *, hub: BinaryIO, folder: Path, threads: int, stop: threading.Event) -> None:
    def send(number: int, progress: Progress) -> None:
        try:
            hub.write(f"{number} {progress.to_line()}".encode())
        except BrokenPipeError:
            stop.set()

    for number, order in enumerate(orders):
        send(number, Progress(name=order.job.name, stage="starting"))
    try:
        from pipelines.train.ray_runner import OwnerRay

        ray = OwnerRay(folder, cpus=threads, gpus=int(any(is_gpu(order.job.device) for order in orders)))
    except BaseException as error:
        for number, order in enumerate(orders):
            send(number, Progress(name=order.job.name, stage="failed", error=error_name(error)))
        raise
    try:
        for number, order in enumerate(orders):
            for progress in _run(order, ray=ray, folder=folder, threads=threads, stop=stop):
                send(number, progress)
    finally:
        ray.stop()


def _run(
    order: Order, *, ray: OwnerRay, folder: Path, threads: int, stop: threading.Event
) -> Iterator[Progress]:
    """Run one order to its end; yields what may be reported, a final stage last."""
    name, outbox = order.job.name, order.job.directory / "outbox"
    if stop.is_set():
        yield Progress(name=name, stage="stopped")
        return
    shutil.rmtree(outbox, ignore_errors=True)
    reports = folder / "reports"
    reports.unlink(missing_ok=True)
    request = TaskRequest(
        job=order.job.model_dump_json(),
        base=order.base.to_json(),
        out=str(outbox),
        version=order.version,
        threads=threads,
        reports=str(reports),
        stop=str(folder / "stop"),
    )
    reference = ray.submit(request.to_json())
    lines, result, deadline = _Tail(reports), None, None
    while result is None:
        result = ray.result(reference, wait_seconds=_POLL_SECONDS)
        for line in lines:
            progress = Progress.from_line(line, name=name)
            if not progress.final:
                yield progress
        if stop.is_set():
            deadline = deadline or time.monotonic() + _GRACE_SECONDS
            if time.monotonic() > deadline:
                result = SealedResult(error="KeyboardInterrupt")
    yield _finish(order, result, outbox=outbox)


def _finish(order: Order, result: SealedResult, *, outbox: Path) -> Progress:
    error = result.error
    if error is None:
        try:
            release(order, outbox=outbox)
            mark_finished(order.job, out=order.out)
            return Progress(name=order.job.name, stage="done", scalars=result.scalars)
        except Exception as failure:
            error = error_name(failure)
    stage = "stopped" if error == "KeyboardInterrupt" else "failed"
    return Progress(name=order.job.name, stage=stage, error=error)


def release(order: Order, *, outbox: Path) -> None:
    """Deliver what is in the outbox if it is exactly an admissible expert of this order, else deliver nothing.

    Raises:
        CoterieError: The folder holds anything that the expert's kind does not allow, or another expert.
    """
    from experts.admission import check_expert, check_files
    from experts.package import read_package

    card = read_package(outbox)
    if (card.name, card.version, card.base) != (order.job.name, order.version, order.base.ref):
        raise TrainingError(
            f"The outbox of {order.job.name} holds another expert, {card.name}@{card.version}."
        )
    check_files(outbox, card)
    check_expert(outbox, card, order.base.description)
    order.out.parent.mkdir(parents=True, exist_ok=True)
    partial = order.out.with_name(f".{order.out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        shutil.copytree(outbox, partial)
        partial.rename(order.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(outbox)


class _Tail:
    """Whole lines as they are appended to a file that may not exist yet; iterating again continues."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0

    def __iter__(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._position += len(line)
                yield line


def _end_children() -> None:
    """Kill whatever is still a child: being the subreaper, that is every process this one ever caused."""
    import psutil

    children = psutil.Process().children(recursive=True)
    for child in children:
        try:
            child.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(children, timeout=5)


if __name__ == "__main__":
    main()
