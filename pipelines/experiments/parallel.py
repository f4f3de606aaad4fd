"""Seeds of an experiment side by side, each in a process of its own.

Knows processes and what they tell each other; knows nothing of cells or arms. Light to import: what a process runs
is imported inside it, after the number of its threads is set.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Literal

from experts.errors import CoterieError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

__all__ = ["Message", "SeedTask", "run_tasks"]

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_WAIT = 0.2  # seconds between two looks at who is alive


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a seed's process tells.

    Attributes:
        seed: Who tells it.
        about: ``"tell"``: ``what`` is a few words on what is going on. ``"cell"``: it is a cell's name. ``"failed"``:
            it is an error.
        what: See ``about``.
    """

    seed: int
    about: Literal["tell", "cell", "failed"]
    what: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedTask:
    """What a process is given.

    Attributes:
        seed: The seed.
        run: ``module:function``, called with ``arguments`` and a function that sends `Message`s.
        arguments: Keyword arguments that can be pickled.
        threads: Threads of the process.
    """

    seed: int
    run: str
    threads: int
    arguments: dict[str, Any] = field(default_factory=dict)


def run_tasks(tasks: Sequence[SeedTask], *, jobs: int, on_message: Callable[[Message], None]) -> None:
    """Run tasks in processes of their own, so many at once; returns when all have ended.

    A task that fails lets the others end, since what they finish is kept. Processes end with this one, however it
    ends.

    Args:
        tasks: What to run, in this order.
        jobs: Processes at once, at least 1.
        on_message: Called here, with everything that the processes tell but failures.

    Raises:
        CoterieError: A task failed with it; the first one is raised.
        RuntimeError: A process ended without a word, as one does that the system killed for memory.
    """
    context = multiprocessing.get_context("spawn")
    inbox = context.Queue()
    waiting, running = list(tasks), dict[int, "SpawnProcess"]()
    failures: dict[int, Exception] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                running[task.seed] = context.Process(target=_work, args=(task, inbox))
                running[task.seed].start()
            wait([process.sentinel for process in running.values()], timeout=_WAIT)
            ended = {seed: process.exitcode for seed, process in running.items() if not process.is_alive()}
            failures |= _drain(inbox, on_message)  # all that an ended process told: it flushes before it ends
            for seed, code in ended.items():
                del running[seed]
                if code:
                    failures.setdefault(seed, _silent(seed, code))
    finally:
        for process in running.values():
            process.terminate()
            process.join()
    if failures:
        raise next(iter(failures.values()))


def _drain(inbox: Any, on_message: Callable[[Message], None]) -> dict[int, Exception]:
    failures: dict[int, Exception] = {}
    while True:
        try:
            message: Message = inbox.get(timeout=0.01)
        except queue.Empty:
            return failures
        if message.about == "failed":
            failures[message.seed] = message.what
        else:
            on_message(message)


def _silent(seed: int, code: int) -> RuntimeError:
    return RuntimeError(
        f"The process of seed {seed} ended with code {code}. Finished cells are kept; if the machine is short of "
        "memory, run fewer seeds at once with --jobs."
    )


def _work(task: SeedTask, outbox: Any) -> None:
    """Run one task in this process."""
    for name in _THREADS:
        os.environ[name] = str(task.threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    module, _, function = task.run.partition(":")
    try:
        getattr(importlib.import_module(module), function)(
            **task.arguments,
            send=lambda about, what: outbox.put(Message(seed=task.seed, about=about, what=what)),
        )
    except KeyboardInterrupt:
        raise SystemExit(130) from None  # whoever started this was interrupted too, and says it
    except CoterieError as error:
        outbox.put(Message(seed=task.seed, about="failed", what=type(error)(str(error))))
        raise SystemExit(1) from None


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only processes that were started from here get here"
    wait([parent.sentinel])
    os._exit(1)
