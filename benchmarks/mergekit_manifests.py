"""Time and memory of building from mergekit-moe's own manifests, against mergekit-moe itself.

Both sides read the same file and write one Mixtral out of the same dense Llama checkpoints: with 2 and with 8 of them,
with random gates and with gates from the base model's hidden states. The benchmark compares every tensor of the two
outputs by name; for random gates both sides draw with the same seed. The figures are the worst of the four builds.

Every tool runs in processes of its own, warmed up on a tiny model, and the tools take turns. Memory is the growth of
peak RSS over the process right before its first run of that build. ``--tiny`` runs everything in one process.
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
from compose import FEW, MANY

AIMS = (
    Aim(figure="time_ratio", bound=1.0),
    Aim(figure="rss_ratio", bound=0.1),
    Aim(figure="tensors_differing", bound=0),
)
ARMS = ("mergekit", "coterie")
MODES = ("random", "hidden")
BUILDS = tuple(f"{mode}-{count}" for mode in MODES for count in (FEW, MANY))


# ---------------------------------------------------------------- jobs: run and measured inside of workers


def prepare(work: str, tiny: bool) -> None:
    """Make the checkpoints and the manifests."""
    from _models import Shape, make_checkpoints

    # about 55 million parameters each, 38 million of them in FFNs
    real = Shape(hidden=512, layers=8, intermediate=3072, vocabulary=8192, heads=8)
    shape = Shape(hidden=32, layers=2, intermediate=48, vocabulary=64, heads=2) if tiny else real
    root = Path(work)
    checkpoints = make_checkpoints(root / "checkpoints", shape, count=MANY)
    for mode in MODES:
        for count in (FEW, MANY):
            write_config(root / f"{mode}-{count}.yaml", checkpoints[:count], mode)


def write_config(path: Path, checkpoints: list[Path], mode: str) -> None:
    """Write mergekit's manifest: an expert per checkpoint, each with two prompts of lengths of its own."""
    lines = [f"base_model: {checkpoints[0]}", f"gate_mode: {mode}", "architecture: mixtral"]
    lines += ["dtype: bfloat16", "experts_per_token: 2", "experts:"]
    for number, checkpoint in enumerate(checkpoints, start=1):
        prompts = [" ".join(["<unk>", "</s>"] * number), " ".join(["<unk>"] * 2 * number)]
        lines += [f"  - source_model: {checkpoint}", f"    positive_prompts: {prompts!r}"]
    path.write_text("\n".join(lines) + "\n")


def mergekit_build(config: str, out: str) -> None:
    """Build in process through mergekit's Python API."""
    import torch
    import yaml
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    torch.manual_seed(0)
    settings = MoEMergeConfig.model_validate(yaml.safe_load(Path(config).read_text()))
    build(settings, out, MergeOptions(copy_tokenizer=True), device="cpu")


def coterie_build(config: str, out: str) -> None:
    """Plan and build, from reading the manifest on."""
    from composer.mergekit_moe import plan_moe, read_manifest
    from composer.mergekit_moe.writing import build_moe

    wish = read_manifest(Path(config))
    assert wish is not None
    build_moe(plan_moe(wish), out, source=Path(config).read_text())


def count_differing(ours: str, theirs: str) -> int:
    """Return how many tensors one side lacks, or has with another dtype, shape or value."""
    import torch
    from safetensors import safe_open

    def tensors(folder: str) -> dict[str, Path]:
        found = {}
        for path in Path(folder).glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        return found

    mine, other = tensors(ours), tensors(theirs)
    differing = set(mine) ^ set(other)
    for name in set(mine) & set(other):
        with safe_open(mine[name], framework="pt") as a, safe_open(other[name], framework="pt") as b:
            left, right = a.get_tensor(name), b.get_tensor(name)
        if left.dtype != right.dtype or not torch.equal(left, right):
            differing.add(name)
    return len(differing)


JOBS: Mapping[str, Mapping[str, Job]] = {
    "setup": {"prepare": prepare, "differing": count_differing},
    "mergekit": {"build": mergekit_build},
    "coterie": {"build": coterie_build},
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
        self.differing = 0
        with self.worker("setup") as worker:
            worker.run("prepare", work=str(self.pico), tiny=True)
            worker.run("prepare", work=str(self.real), tiny=tiny)

    def worker(self, name: str) -> AbstractContextManager[Worker | Inline]:
        """Start a worker for the enclosed code."""
        return started(Path(__file__).resolve(), name, jobs=JOBS, work=self.work, tiny=self.tiny)

    def run(self, rounds: int) -> None:
        """Let the arms take turns at every build, in workers of that build."""
        for build in BUILDS:
            with ExitStack() as stack:
                workers = {arm: stack.enter_context(self.worker(arm)) for arm in ARMS}
                self._first(build, workers)
                for turn in range(rounds):
                    for arm in ARMS if turn % 2 == 0 else reversed(ARMS):
                        self.keep(f"{arm} {build}", self.build(workers[arm], self.real, build, arm))
                        shutil.rmtree(self.work / arm)

    def _first(self, build: str, workers: Mapping[str, Worker | Inline]) -> None:
        """Warm both arms up, take their memory, and compare what they wrote."""
        for arm in ARMS:
            self.build(workers[arm], self.pico, build, arm)
            shutil.rmtree(self.work / arm)
        for arm in ARMS:
            self.keep(f"first {arm} {build}", self.build(workers[arm], self.real, build, arm))
        with self.worker("setup") as worker:
            ours, theirs = str(self.work / "coterie"), str(self.work / "mergekit")
            self.differing += worker.run("differing", ours=ours, theirs=theirs).result
        for arm in ARMS:
            shutil.rmtree(self.work / arm)

    def build(self, worker: Worker | Inline, folder: Path, build: str, arm: str) -> Sample:
        """Let an arm write its checkpoint."""
        os.sync()  # nobody pays for another's dirty pages
        return worker.run("build", config=str(folder / f"{build}.yaml"), out=str(self.work / arm))

    def keep(self, arm: str, sample: Sample) -> None:
        """Record a run."""
        self.samples.setdefault(arm, []).append(self.report.run(arm, sample))

    def figures(self, clock: str) -> None:
        """Derive the figures from the samples."""
        figure = self.report.figure
        seconds, growth = {}, {}
        for build in BUILDS:
            ours, theirs = (times(self.samples[f"{arm} {build}"], clock) for arm in ("coterie", "mergekit"))
            seconds[build] = ratio(ours, theirs)
            mine, other = (
                self.samples[f"first {arm} {build}"][0].growth_mb for arm in ("coterie", "mergekit")
            )
            growth[build] = mine / max(other, 0.001)
        figure("time_ratio", max(seconds.values()))
        figure("rss_ratio", max(growth.values()))
        figure("tensors_differing", self.differing)
        for build in BUILDS:
            figure(f"time_ratio_{build.replace('-', '_')}", seconds[build])
            figure(f"rss_ratio_{build.replace('-', '_')}", growth[build])


def main() -> None:
    """Run the benchmark, or serve one of its workers."""
    options = arguments(__doc__, rounds=3).parse_args()
    if options.worker:
        _preload(options.worker)
        serve(JOBS[options.worker])
        return
    report = Report(name="mergekit_manifests", aims=AIMS)
    with working_folder(options.work) as work:
        bench = Bench(work, report, tiny=options.tiny)
        bench.run(options.rounds)
        bench.figures(options.clock)
    report.write(options.out)


def _preload(worker: str) -> None:
    """Import what a worker's jobs need, so that no measurement contains it."""
    if worker == "mergekit":
        import mergekit.scripts.moe  # noqa: F401
    elif worker == "coterie":
        import transformers  # noqa: F401

        import composer.mergekit_moe.gates
        import composer.mergekit_moe.streamed
        import composer.mergekit_moe.writing  # noqa: F401


if __name__ == "__main__":
    main()
