"""Build time and memory of a composition against ``mergekit-moe`` and against copying the same bytes.

Both sides make one model out of the FFNs of the same dense Llama checkpoints: ``mergekit-moe`` writes a Mixtral
with one expert per checkpoint, coterie composes the first checkpoint as the anchor with the others' FFNs, which
are registered beforehand. The benchmark checks that the expert tensors are equal before it measures.

Every tool runs in processes of its own, warmed up on a tiny model, and the tools take turns. Memory is the growth
of peak RSS over the process right before its first run of that size.

The stock class maps a fused checkpoint and reads nothing until it is used, so ``load_vs_stock`` takes the time until
every weight has been touched; ``load_call_vs_stock`` is the call alone. ``--tiny`` runs everything in one process.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

from _common import (
    Aim,
    Inline,
    Job,
    Report,
    Sample,
    Worker,
    arguments,
    ratio,
    run_command,
    serve,
    started,
    times,
    working_folder,
)

AIMS = (
    Aim(figure="time_vs_mergekit", bound=0.15),
    Aim(figure="rss_vs_mergekit", bound=0.1),
    Aim(figure="rss_8_vs_2", bound=1.1),
    Aim(figure="copy_time_vs_mergekit", bound=1.0),
)
FEW, MANY = 2, 8
"""Numbers of checkpoints, and so of FFNs per layer."""


# ---------------------------------------------------------------- jobs: run and measured inside of workers


def mergekit_build(config: str, out: str) -> None:
    """Build a Mixtral in process through mergekit's Python API."""
    import yaml
    from mergekit.merge import MergeOptions
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.scripts.moe import build

    settings = MoEMergeConfig.model_validate(yaml.safe_load(Path(config).read_text()))
    build(settings, out, MergeOptions(copy_tokenizer=True), allow_all_same=True)


def coterie_build(manifest: str, registry: str, out: str, copy: bool) -> None:
    """Plan and build a composition, from opening the registry on."""
    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from registry import Registry

    store = Registry(registry)
    build(plan(Manifest.from_file(manifest), store), out, registry=store, copy=copy)


def copy_files(source: str, out: str) -> None:
    """Copy a folder's files and make them durable, which is the least that writing these bytes can cost."""
    Path(out).mkdir()
    for number, path in enumerate(sorted(Path(source).rglob("*"))):
        if path.is_file():
            target = Path(out) / str(number)
            shutil.copyfile(path, target)
            with target.open("rb") as file:
                os.fsync(file.fileno())


def coterie_load(folder: str, touch: bool) -> int:
    """Load a composed folder and, if asked to, touch its weights; return the bytes of its parameters."""
    from composer.loading import load

    return _finish(load(folder), touch=touch)


def stock_load(folder: str, touch: bool) -> int:
    """Load a Mixtral with its stock class and, if asked to, touch its weights; return their bytes."""
    from transformers import MixtralForCausalLM

    return _finish(MixtralForCausalLM.from_pretrained(folder, dtype="auto"), touch=touch)


def _finish(model: Any, *, touch: bool) -> int:
    """Read one byte of every page of memory that holds parameters, so that mapped files are read in."""
    import torch

    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        if touch:
            parameter.data.view(-1).view(torch.uint8)[::4096].sum()
    return total


def compare_tensors(composed: str, mergekit: str, fused: str) -> int:
    """Check that both sides hold the same expert tensors, save the stock model fused; return their number.

    Raises:
        SystemExit: They differ.
    """
    import torch
    from transformers import MixtralForCausalLM

    from composer.loading import load

    ours: Any = load(composed)
    theirs = MixtralForCausalLM.from_pretrained(mergekit, dtype="auto")
    pairs = list(zip(ours.base.model.layers, theirs.model.layers, strict=True))
    for mine, other in pairs:
        for name in ("gate_up_proj", "down_proj"):
            if not torch.equal(getattr(mine.mlp.experts, name), getattr(other.mlp.experts, name)):
                raise SystemExit(f"{name} differs between the composed folder and mergekit's")
    theirs.save_pretrained(fused, save_original_format=False)
    return 2 * len(pairs)


def prepare(work: str, counts: list[int], tiny: bool) -> None:
    """Make checkpoints, the registry, and both tools' configurations for every number of checkpoints."""
    from _models import Shape, make_checkpoints, register_ffn, register_public_rows, write_manifest

    from registry import Registry

    # about 55 million parameters each, 38 million of them in FFNs
    real = Shape(hidden=512, layers=8, intermediate=3072, vocabulary=8192, heads=8)
    shape = Shape(hidden=32, layers=2, intermediate=48, vocabulary=64, heads=2) if tiny else real
    root = Path(work)
    checkpoints = make_checkpoints(root / "checkpoints", shape, count=max(counts))
    registry = Registry(root / "registry")
    base = register_public_rows(registry, checkpoints[0], root)
    names = [f"owner-{number}/ffn" for number in range(1, max(counts))]
    for number, name in enumerate(names, start=1):
        register_ffn(registry, name, shape.ffn(number), base=base, work=root, seed=number)
    for count in counts:
        write_manifest(root / f"manifest-{count}.yaml", names[: count - 1])
        write_mergekit_config(root / f"mergekit-{count}.yaml", checkpoints[:count])


def write_mergekit_config(path: Path, checkpoints: list[Path]) -> None:
    """Write mergekit's configuration: random gates, one expert per checkpoint."""
    lines = [f"base_model: {checkpoints[0]}", "gate_mode: random", "architecture: mixtral"]
    lines += ["dtype: bfloat16", "experts_per_token: 2", "experts:"]
    lines += [f"  - source_model: {checkpoint}" for checkpoint in checkpoints]
    path.write_text("\n".join(lines) + "\n")


JOBS: Mapping[str, Mapping[str, Job]] = {
    "setup": {"prepare": prepare, "compare": compare_tensors},
    "mergekit": {"build": mergekit_build},
    "coterie": {"build": coterie_build},
    "copy": {"copy": copy_files},
    "load-coterie": {"load": coterie_load},
    "load-stock": {"load": stock_load},
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
        self.real = work / "real"
        self.pico = work / "pico"
        self.samples: dict[str, list[Sample]] = {}
        with self.worker("setup") as worker:
            worker.run("prepare", work=str(self.pico), counts=[FEW], tiny=True)
            worker.run("prepare", work=str(self.real), counts=[FEW, MANY], tiny=tiny)

    def worker(self, name: str) -> AbstractContextManager[Worker | Inline]:
        """Start a worker for the enclosed code."""
        script = Path(__file__).resolve()
        return started(script, name, jobs=JOBS, work=self.work, tiny=self.tiny)

    def keep(self, arm: str, sample: Sample) -> None:
        """Record a run."""
        self.samples.setdefault(arm, []).append(self.report.run(arm, sample))

    def build(
        self, worker: Worker | Inline, arm: str, folder: Path, count: int, *, keep: Path | None = None
    ) -> Sample:
        """Run one build of an arm (``mergekit``, ``linked``, ``copy``) and remove what it wrote."""
        out = keep or self.work / "out"
        os.sync()  # nobody pays for another's dirty pages
        if arm == "mergekit":
            options: dict[str, Any] = {"config": str(folder / f"mergekit-{count}.yaml")}
        else:
            options = {
                "manifest": str(folder / f"manifest-{count}.yaml"),
                "registry": str(folder / "registry"),
                "copy": arm == "copied",
            }
        sample = worker.run("build", out=str(out), **options)
        if keep is None:
            shutil.rmtree(out)
        return sample

    def builds(self, rounds: int) -> None:
        """Let the arms build in turns: memory in a process of its own for each, then time in the same ones."""
        for count in (FEW, MANY):
            with (
                self.worker("mergekit") as mergekit,
                self.worker("coterie") as linked,
                self.worker("coterie") as copied,
                self.worker("copy") as copy,
            ):
                arms = {"mergekit": mergekit, "linked": linked, "copied": copied}
                for arm, worker in arms.items():
                    self.build(worker, arm, self.pico, FEW)
                for turn in range(rounds):
                    for arm in list(arms) if turn % 2 == 0 else reversed(arms):
                        self.keep(f"{arm}-{count}", self.build(arms[arm], arm, self.real, count))
                    if count == MANY:
                        os.sync()
                        source, out = self.work / "composed", self.work / "out"
                        self.keep("raw-copy-8", copy.run("copy", source=str(source), out=str(out)))
                        shutil.rmtree(out)

    def prepare_outputs(self) -> None:
        """Keep one output of both tools, compare their tensors, and save the stock model fused."""
        paths = {name: self.work / name for name in ("mergekit", "composed", "fused")}
        with self.worker("mergekit") as worker:
            self.build(worker, "mergekit", self.real, MANY, keep=paths["mergekit"])
        with self.worker("coterie") as worker:
            self.build(worker, "linked", self.real, MANY, keep=paths["composed"])
        with self.worker("setup") as worker:
            worker.run("compare", **{name: str(path) for name, path in paths.items()})
        shutil.rmtree(paths["mergekit"])

    def loads(self, rounds: int) -> None:
        """Let both sides load the same tensors in turns."""
        with self.worker("load-coterie") as coterie, self.worker("load-stock") as stock:
            sides = {"load-coterie": (coterie, "composed"), "load-stock": (stock, "fused")}
            for turn in range(rounds + 1):  # the first round warms the processes up
                for touch, suffix in ((True, ""), (False, "-call")):
                    for arm in list(sides) if turn % 2 == 0 else reversed(sides):
                        worker, folder = sides[arm]
                        sample = worker.run("load", folder=str(self.work / folder), touch=touch)
                        if turn:
                            self.keep(arm + suffix, sample)

    def commands(self, rounds: int) -> None:
        """Let the command lines build in turns, start-up included."""
        folder, out, log = self.real, self.work / "out", self.work / "log-command.txt"
        mergekit = [
            sys.executable,
            "-m",
            "mergekit.scripts.moe",
            str(folder / f"mergekit-{MANY}.yaml"),
            str(out),
        ]
        coterie = [sys.executable, "-m", "pipelines.cli", "--registry", str(folder / "registry")]
        coterie += ["build", str(folder / f"manifest-{MANY}.yaml"), str(out)]
        for _ in range(rounds):
            for arm, command in (("mergekit", mergekit), ("linked", coterie)):
                os.sync()
                self.keep(f"command-{arm}-8", run_command(command, log=log))
                shutil.rmtree(out)

    def figures(self, clock: str) -> None:
        """Derive the figures from the samples."""

        def of(arm: str) -> list[float]:
            return times(self.samples[arm], clock)

        first = {arm: samples[0] for arm, samples in self.samples.items()}
        figure = self.report.figure
        figure("time_vs_mergekit", ratio(of("linked-8"), of("mergekit-8")))
        figure("rss_vs_mergekit", first["linked-8"].growth_mb / max(first["mergekit-8"].growth_mb, 0.001))
        figure("rss_8_vs_2", first["copied-8"].peak_mb / first["copied-2"].peak_mb)
        figure("copy_time_vs_mergekit", ratio(of("copied-8"), of("mergekit-8")))
        figure("time_vs_copy", ratio(of("linked-8"), of("raw-copy-8")))
        figure("load_vs_stock", ratio(of("load-coterie"), of("load-stock")))
        figure("load_call_vs_stock", ratio(of("load-coterie-call"), of("load-stock-call")))
        figure("copy_time_vs_copy", ratio(of("copied-8"), of("raw-copy-8")))
        figure("time_8_vs_2", median(of("linked-8")) / median(of("linked-2")))
        figure("copy_growth_mb_2", first["copied-2"].growth_mb)
        figure("copy_growth_mb_8", first["copied-8"].growth_mb)
        if "command-linked-8" in self.samples:
            figure("command_time_vs_mergekit", ratio(of("command-linked-8"), of("command-mergekit-8")))


def main() -> None:
    """Run the benchmark, or serve one of its workers."""
    options = arguments(__doc__, rounds=5).parse_args()
    if options.worker:
        _preload(options.worker)
        serve(JOBS[options.worker])
        return
    report = Report(name="compose", aims=AIMS)
    with working_folder(options.work) as work:
        bench = Bench(work, report, tiny=options.tiny)
        bench.prepare_outputs()
        bench.builds(options.rounds)
        bench.loads(options.rounds)
        if not options.tiny:
            bench.commands(max(1, options.rounds // 2))
        bench.figures(options.clock)
    report.write(options.out)


def _preload(worker: str) -> None:
    """Import what a worker's jobs need, so that no measurement contains it."""
    if worker == "mergekit":
        import mergekit.scripts.moe  # noqa: F401
    elif worker == "coterie":
        import registry  # noqa: F401
    elif worker.startswith("load-"):
        import transformers  # noqa: F401


if __name__ == "__main__":
    main()
