"""Time and memory of an export to Mixtral against ``mergekit-moe`` and against copying the same bytes.

Both sides write one Mixtral checkpoint out of the FFNs of the same dense Llama checkpoints: ``mergekit-moe`` from the
checkpoints, coterie from a composed folder of the first as the anchor and the others' FFNs. Copying is what the disk
takes for the bytes of that output. The benchmark checks that the stock class loads the same tensors from both, but for
mergekit's random gates.

Every tool runs in processes of its own, warmed up on a tiny model, and the tools take turns. Memory is the growth
of peak RSS over the process right before its first run of that size. ``--tiny`` runs everything in one process.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from _common import (
    Aim,
    Inline,
    Job,
    Report,
    Sample,
    Worker,
    arguments,
    ratio,
    serve,
    started,
    times,
    working_folder,
)
from compose import MANY, copy_files, coterie_build, mergekit_build, prepare

AIMS = (
    Aim(figure="time_vs_mergekit", bound=1.0),
    Aim(figure="time_vs_copy", bound=1.3),
    Aim(figure="rss_vs_mergekit", bound=0.1),
)
ARMS = ("mergekit", "export", "copy")


# ---------------------------------------------------------------- jobs: run and measured inside of workers


def coterie_export(folder: str, out: str) -> None:
    """Check a composed folder, lay it out and write it as a Mixtral."""
    from composer.export.exporting import export, plan_export

    export(plan_export(folder, "mixtral"), out)


def compare_checkpoints(ours: str, theirs: str) -> int:
    """Check that the stock class loads the same tensors from both, but for gates; return their number.

    Raises:
        SystemExit: It does not.
    """
    import torch
    from transformers import MixtralForCausalLM

    mine, other = (
        MixtralForCausalLM.from_pretrained(folder, dtype="auto").state_dict() for folder in (ours, theirs)
    )
    differing = [
        name for name in mine if "gate.weight" not in name and not torch.equal(mine[name], other[name])
    ]
    if differing:
        raise SystemExit(f"{len(differing)} tensors differ, for instance {differing[0]}")
    return len(mine)


JOBS: Mapping[str, Mapping[str, Job]] = {
    "setup": {"prepare": prepare, "build": coterie_build, "compare": compare_checkpoints},
    "mergekit": {"write": mergekit_build},
    "export": {"write": coterie_export},
    "copy": {"write": copy_files},
}


# ---------------------------------------------------------------- the benchmark


class Bench:
    """Runs the arms and remembers their samples.

    Args:
        work: Temporary folder.
        report: Where every run is recorded.
        tiny: Whether the models are tiny.
    """

    def __init__(self, work: Path, report: Report, *, tiny: bool) -> None:
        self.work = work
        self.report = report
        self.tiny = tiny
        self.pico, self.real = work / "pico", work / "real"
        self.samples: dict[str, list[Sample]] = {}
        with self.worker("setup") as worker:
            for folder, small in ((self.pico, True), (self.real, tiny)):
                worker.run("prepare", work=str(folder), counts=[MANY], tiny=small)
                worker.run(
                    "build",
                    manifest=str(folder / f"manifest-{MANY}.yaml"),
                    registry=str(folder / "registry"),
                    out=str(folder / "composed"),
                    copy=False,
                )

    def worker(self, name: str) -> AbstractContextManager[Worker | Inline]:
        """Start a worker for the enclosed code."""
        script = Path(__file__).resolve()
        return started(script, name, jobs=JOBS, work=self.work, tiny=self.tiny)

    def write(self, worker: Worker | Inline, arm: str, folder: Path, out: Path) -> Sample:
        """Let an arm write its checkpoint."""
        os.sync()  # nobody pays for another's dirty pages
        source = {
            "mergekit": {"config": str(folder / f"mergekit-{MANY}.yaml")},
            "export": {"folder": str(folder / "composed")},
            "copy": {"source": str(folder / "stock")},
        }[arm]
        return worker.run("write", out=str(out), **source)

    def run(self, rounds: int) -> None:
        """Warm every arm up, compare what the first round wrote, and let them take turns."""
        with ExitStack() as stack:
            workers = {arm: stack.enter_context(self.worker(arm)) for arm in ARMS}
            for folder in (self.pico, self.real):
                first = {
                    arm: folder / name for arm, name in zip(ARMS, ("theirs", "stock", "copied"), strict=True)
                }
                for arm in ARMS:
                    sample = self.write(workers[arm], arm, folder, first[arm])
                    if folder == self.real:
                        self.keep(f"first-{arm}", sample)
                self.compare(first["export"], first["mergekit"])
                shutil.rmtree(first["mergekit"])
                shutil.rmtree(first["copy"])
            for turn in range(rounds):
                for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
                    out = self.work / "out"
                    self.keep(arm, self.write(workers[arm], arm, self.real, out))
                    shutil.rmtree(out)

    def compare(self, ours: Path, theirs: Path) -> None:
        """Check both outputs in a process that is not measured."""
        with self.worker("setup") as worker:
            worker.run("compare", ours=str(ours), theirs=str(theirs))

    def keep(self, arm: str, sample: Sample) -> None:
        """Record a run."""
        self.samples.setdefault(arm, []).append(self.report.run(arm, sample))

    def figures(self, clock: str) -> None:
        """Derive the figures from the samples."""
        taken = {arm: times(self.samples[arm], clock) for arm in ARMS}
        growth = {arm: self.samples[f"first-{arm}"][0].growth_mb for arm in ARMS}
        figure = self.report.figure
        figure("time_vs_mergekit", ratio(taken["export"], taken["mergekit"]))
        figure("time_vs_copy", ratio(taken["export"], taken["copy"]))
        figure("rss_vs_mergekit", growth["export"] / max(growth["mergekit"], 0.001))
        figure("growth_mb", growth["export"])


def main() -> None:
    """Run the benchmark, or serve one of its workers."""
    options = arguments(__doc__, rounds=5).parse_args()
    if options.worker:
        _preload(options.worker)
        serve(JOBS[options.worker])
        return
    report = Report(name="export", aims=AIMS)
    with working_folder(options.work) as work:
        bench = Bench(work, report, tiny=options.tiny)
        bench.run(options.rounds)
        bench.figures(options.clock)
    report.write(options.out)


def _preload(worker: str) -> None:
    """Import what a worker's jobs need, so that no measurement contains it."""
    if worker == "mergekit":
        import mergekit.scripts.moe  # noqa: F401
    elif worker == "export":
        import transformers  # noqa: F401

        import composer.export.exporting  # noqa: F401


if __name__ == "__main__":
    main()
