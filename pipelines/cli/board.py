"""The live table of training jobs: owner, stage, step, tokens a second, loss, time left.

Knows the allow-listed reports of jobs and a terminal; where stderr is none, one line a stage is written instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pipelines.cli.output import note
from pipelines.cli.progress import on_terminal

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.train.progress import Progress

__all__ = ["job_board", "job_cells"]

COLUMNS = ("EXPERT", "STAGE", "STEP", "TOKENS/S", "LOSS", "TIME LEFT")


@contextmanager
def job_board(names: Sequence[str]) -> Iterator[Callable[[Progress], None]]:
    """Yield a function to call with every report of every job; may be called from several threads."""
    if not on_terminal():
        yield _StageLog().report
        return
    from rich.console import Console
    from rich.live import Live

    latest: dict[str, Progress] = {}

    def draw() -> Table:
        return _table(names, latest)

    def report(progress: Progress) -> None:
        latest[progress.name] = progress

    with Live(get_renderable=draw, console=Console(stderr=True), refresh_per_second=5):
        yield report


class _StageLog:
    """Writes one line when a job enters another stage."""

    def __init__(self) -> None:
        self._stages: dict[str, str] = {}

    def report(self, progress: Progress) -> None:
        if self._stages.get(progress.name) == progress.stage:
            return
        self._stages[progress.name] = progress.stage
        note(f"{progress.name}: {progress.stage}" + (f" ({progress.error})" if progress.error else ""))


def _table(names: Sequence[str], latest: Mapping[str, Progress]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("EXPERT", "STAGE") else "right")
    for name in names:
        table.add_row(*job_cells(name, latest.get(name)))
    return table


def job_cells(name: str, progress: Progress | None) -> tuple[str, ...]:
    """Return one row of the table for a job's latest report; ``-`` where a number is not known yet."""
    if progress is None:
        return (name, "queued", "-", "-", "-", "-")
    scalars = progress.scalars
    stage = f"{progress.stage} ({progress.error})" if progress.error else progress.stage
    step = f"{scalars['step']}/{scalars['steps']}" if {"step", "steps"} <= scalars.keys() else "-"
    rate = f"{scalars['tokens_per_second']:,.0f}" if "tokens_per_second" in scalars else "-"
    loss = f"{scalars['loss']:.3f}" if "loss" in scalars else "-"
    left = "-" if progress.final else _clock(scalars.get("eta_seconds"))
    return (name, stage, step, rate, loss, left)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
