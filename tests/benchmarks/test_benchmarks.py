"""The benchmarks run and write what other programs read. Nothing here asserts a time."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FIGURES = {
    "bam": {"decode_vs_flops", "prefill_vs_btx"},
    "compose": {
        "time_vs_mergekit",
        "rss_vs_mergekit",
        "rss_8_vs_2",
        "copy_time_vs_mergekit",
        "time_vs_copy",
        "load_vs_stock",
    },
    "export": {"time_vs_mergekit", "time_vs_copy", "rss_vs_mergekit"},
    "mergekit_manifests": {"time_ratio", "rss_ratio", "tensors_differing"},
    "forward": {"prefill_vs_stock", "decode_vs_stock", "optout_overhead"},
    "retriever": {"query_cost", "mixed_cost", "thread_errors", "route_100k_ms", "index_docs_per_second"},
}
RUN_KEYS = {"arm", "seconds", "cpu_seconds", "growth_mb", "peak_mb"}


@pytest.mark.parametrize("name", FIGURES)
def test_script_writes_the_promised_figures(name: str, bench: Callable[[str], dict[str, Any]]) -> None:
    data = bench(name)
    assert set(data) == {"figures", "runs", "machine"}
    assert {f"{name}.{figure}" for figure in FIGURES[name]} <= set(data["figures"])
    assert all(key.startswith(f"{name}.") for key in data["figures"])
    assert all(math.isfinite(value) for value in data["figures"].values())
    assert data["runs"]
    assert all(set(run) >= RUN_KEYS for run in data["runs"])
    assert data["machine"]["cpus"] >= 1


# a process of its own: what other tests took or gave back must not show
_TWO_JOBS = """
import subprocess
import sys
sys.path.insert(0, sys.argv[1])
from _common import measure
before = measure(lambda: len(bytearray(b"x" * (150 << 20))))
sample = measure(lambda: len(bytearray(b"x") * (60 << 20)))
print(before.growth_mb, sample.growth_mb, sample.result)
"""


def test_peak_memory_is_what_the_job_took(common: ModuleType) -> None:
    folder = str(Path(common.__file__ or "").parent)
    done = subprocess.run(
        [sys.executable, "-c", _TWO_JOBS, folder], capture_output=True, text=True, check=True
    )
    before, growth, result = map(float, done.stdout.split())
    assert before > 150
    assert result == 60 << 20
    assert 60 < growth < 75, "a peak of earlier work does not count"


def test_ratio_is_the_median_of_the_pairs(common: ModuleType) -> None:
    assert common.ratio([1.0, 2.0, 30.0], [2.0, 4.0, 10.0]) == 0.5


def test_aims_hold_at_their_bound(common: ModuleType) -> None:
    at_most, at_least = common.Aim(figure="a", bound=0.1), common.Aim(figure="b", bound=0.98, at_least=True)
    assert (at_most.met(0.1), at_most.met(0.11), str(at_most)) == (True, False, "<= 0.1")
    assert (at_least.met(0.98), at_least.met(0.97), str(at_least)) == (True, False, ">= 0.98")


def test_report_writes_figures_runs_and_machine(common: ModuleType, tmp_path: Path) -> None:
    report = common.Report(name="x", aims=[common.Aim(figure="speed", bound=1)])
    report.run("arm", common.Sample(seconds=1, cpu_seconds=2, growth_mb=3, peak_mb=4, result="dropped"))
    report.figure("speed", 0.123456)
    report.write(tmp_path / "new" / "x.json")
    data = json.loads((tmp_path / "new" / "x.json").read_text())
    assert data["figures"] == {"x.speed": 0.1235}
    assert data["runs"] == [{"arm": "arm", "seconds": 1, "cpu_seconds": 2, "growth_mb": 3, "peak_mb": 4}]


WORKER = """
import subprocess
import sys
sys.path.insert(0, {folder!r})
from _common import serve

def double(value):
    print("noise")
    return 2 * value

serve({{"double": double}})
"""


def test_worker_answers_and_tells_of_a_failure(common: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(WORKER.format(folder=str(Path(common.__file__).parent)))
    worker = common.Worker(script, "any", log=tmp_path / "log")
    assert worker.run("double", value=21).result == 42
    with pytest.raises(RuntimeError, match=r"(?s)^the job 'double' failed:\n.*missing 1 required positional"):
        worker.run("double")
    worker.close()


def test_command_is_measured_and_its_failure_told(common: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    sample = common.run_command([sys.executable, "-c", "b'x' * (40 << 20)"], log=log)
    assert sample.peak_mb > 40
    with pytest.raises(RuntimeError, match=r"(?s)failed with 3:\nbroken"):
        common.run_command([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], log=log)
