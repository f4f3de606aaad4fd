"""What every benchmark shares: measuring work in fresh processes, and writing figures.

Knows clocks, memory counters and the format of the results; knows nothing of what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

__all__ = [
    "Aim",
    "Inline",
    "Job",
    "Report",
    "Sample",
    "Worker",
    "arguments",
    "measure",
    "ratio",
    "run_command",
    "serve",
    "started",
    "times",
    "working_folder",
]

Job = Callable[..., Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One measurement.

    Attributes:
        seconds: Wall time.
        cpu_seconds: User and system time of the process, all threads.
        growth_mb: Peak resident set over the resident set before the work, in 10^6 bytes.
        peak_mb: Peak resident set of the process during the work, in 10^6 bytes.
        result: What the work returned.
    """

    seconds: float
    cpu_seconds: float
    growth_mb: float
    peak_mb: float
    result: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """A bound that a figure should keep."""

    figure: str
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Return whether a value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.bound:g}"


# ---------------------------------------------------------------- measuring


def measure(job: Job, **options: Any) -> Sample:
    """Run a job in this process and measure it.

    The peak counter is reset first (Linux, ``clear_refs``), so that a peak during the imports hides nothing.
    """
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = _memory_mb("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    result = job(**options)
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    peak = _memory_mb("VmHWM")
    return Sample(
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        growth_mb=max(0.0, peak - before),
        peak_mb=peak,
        result=result,
    )


def _memory_mb(counter: str) -> float:
    match = re.search(rf"{counter}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, "this benchmark reads Linux' /proc"
    return int(match.group(1)) * 1024 / 1e6


def run_command(command: Sequence[str], *, log: Path) -> Sample:
    """Run a command to its end and measure its process; growth is then the whole peak.

    Raises:
        RuntimeError: It failed; the message holds the end of its output.
    """
    wall = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - wall
    if process.returncode:
        end = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{command[0]} failed with {process.returncode}:\n{end}")
    peak = usage.ru_maxrss * 1024 / 1e6
    return Sample(seconds=seconds, cpu_seconds=usage.ru_utime + usage.ru_stime, growth_mb=peak, peak_mb=peak)


class Worker:
    """A process of its own that has done its imports and waits for jobs.

    Args:
        script: The benchmark; started with ``--worker NAME``, it calls `serve`.
        name: Which jobs it serves.
        log: Where its output goes.
    """

    def __init__(self, script: Path, name: str, *, log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(script), "--worker", name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def run(self, job: str, **options: Any) -> Sample:
        """Run and measure one job; options and result travel as JSON.

        Raises:
            RuntimeError: The job failed; the message holds the end of the worker's output.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, "options": options}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self.close()
            end = self.log.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"the job '{job}' failed:\n{end}")
        return Sample(**json.loads(answer))

    def close(self) -> None:
        """End the process; may be called again."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()


class Inline:
    """Stands in for a `Worker` where only the result counts: jobs run in this process."""

    def __init__(self, jobs: Mapping[str, Job]) -> None:
        self._jobs = jobs

    def run(self, job: str, **options: Any) -> Sample:
        """Run and measure one job."""
        return measure(self._jobs[job], **options)

    def close(self) -> None:
        """Do nothing."""


@contextlib.contextmanager
def started(
    script: Path, name: str, *, jobs: Mapping[str, Mapping[str, Job]], work: Path, tiny: bool
) -> Iterator[Worker | Inline]:
    """Start a worker for the enclosed code.

    Args:
        script: The benchmark.
        name: Which of its jobs.
        jobs: All of them.
        work: Folder for the worker's log.
        tiny: Run the jobs in this process instead.
    """
    number = len(list(work.glob("log-*")))
    worker = Inline(jobs[name]) if tiny else Worker(script, name, log=work / f"log-{number}-{name}.txt")
    try:
        yield worker
    finally:
        worker.close()


def serve(jobs: Mapping[str, Job]) -> None:
    """Answer a `Worker` until it hangs up. What the jobs print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            sample = measure(jobs[request["job"]], **request["options"])
            answers.write(json.dumps(asdict(sample)) + "\n")
            answers.flush()


def times(samples: Sequence[Sample], clock: str) -> list[float]:
    """Return the wall or the CPU times of samples."""
    return [sample.seconds if clock == "wall" else sample.cpu_seconds for sample in samples]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of runs that took turns; a drift of the machine cancels in each pair."""
    return median(a / b for a, b in zip(ours, theirs, strict=True))


# ---------------------------------------------------------------- reporting


@dataclass(slots=True, kw_only=True)
class Report:
    """Figures of one benchmark and the runs behind them.

    Attributes:
        name: Of the benchmark; prefix of every figure.
        aims: Bounds to print beside the figures.
    """

    name: str
    aims: Sequence[Aim] = ()
    figures: dict[str, float] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=lambda: _machine())

    def figure(self, name: str, value: float) -> None:
        """Record ``NAME.figure``."""
        self.figures[f"{self.name}.{name}"] = round(value, 4)

    def run(self, arm: str, sample: Sample, **labels: Any) -> Sample:
        """Record one run and hand it back."""
        numbers = {key: round(value, 4) for key, value in asdict(sample).items() if key != "result"}
        self.runs.append({"arm": arm, **labels, **numbers})
        return sample

    def write(self, out: Path | None) -> None:
        """Print the tables and write the JSON file."""
        self._print()
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            data = {"figures": self.figures, "runs": self.runs, "machine": self.machine}
            out.write_text(json.dumps(data, indent=1) + "\n")

    def _print(self) -> None:
        from rich.console import Console
        from rich.table import Table

        console = Console(highlight=False)
        runs = Table(
            "arm", "runs", "median s", "min s", "CPU s", "growth MB", "peak MB", title=f"{self.name}: runs"
        )
        for arm in dict.fromkeys(run["arm"] for run in self.runs):
            mine = [run for run in self.runs if run["arm"] == arm]
            columns = [
                [run[key] for run in mine] for key in ("seconds", "cpu_seconds", "growth_mb", "peak_mb")
            ]
            wall, cpu, growth, peak = columns
            cells = (median(wall), min(wall), median(cpu), growth[0], peak[0])
            runs.add_row(
                arm, str(len(mine)), *(f"{x:.3f}" for x in cells[:3]), *(f"{x:.1f}" for x in cells[3:])
            )
        console.print(runs)
        figures = Table("figure", "value", "aim", "", title=f"{self.name}: figures")
        aims = {f"{self.name}.{aim.figure}": aim for aim in self.aims}
        for name, value in self.figures.items():
            aim = aims.get(name)
            verdict = "" if aim is None else "met" if aim.met(value) else "missed"
            figures.add_row(name, f"{value:.4g}", "" if aim is None else str(aim), verdict)
        console.print(figures)


def _machine() -> dict[str, Any]:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = {}
    for package in ("torch", "transformers", "mergekit", "safetensors"):
        with contextlib.suppress(PackageNotFoundError):
            packages[package] = version(package)
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": packages,
        "load_average": list(os.getloadavg()),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """Make the parser with what every benchmark understands."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=rounds, help="alternating runs (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a size that only shows that everything runs")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="what figures are made of; the processes' own time helps on a busy machine (default: %(default)s)",
    )
    parser.add_argument("--work", type=Path, help="parent of the temporary folder (default: the system's)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


@contextlib.contextmanager
def working_folder(parent: Path | None) -> Iterator[Path]:
    """Yield a temporary folder that is removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="coterie-bench-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
