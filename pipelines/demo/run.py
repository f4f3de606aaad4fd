"""Runs the demonstration from the anchor to the report.

Knows the order of the steps and where their files go; every step is done by the part of the project that does it
for everybody.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from experts.errors import DataError, TrainingError
from experts.routing_artifacts import RoutingInfo
from pipelines.demo.report import DemoReport, Sample, nll_table, routing_table
from pipelines.demo.settings import FULL, QUICK, DemoInputs, DemoOwner, DemoSettings
from pipelines.demo.stages import Stages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from pipelines.evaluate import Evaluation
    from registry import Registry

__all__ = ["run_demo"]

MARKER = ".coterie-demo"
"""Stands in a folder that this module made, and may therefore empty."""


def run_demo(
    out: Path,
    *,
    registry: Registry | None = None,
    quick: bool = False,
    console: Console | None = None,
    inputs: DemoInputs | None = None,
    settings: DemoSettings | None = None,
) -> DemoReport:
    """Train three owners' experts apart, compose them, measure every arm, and leave each owner out.

    Everything is written below ``out``: the owners' text and jobs, the experts, the manifest, the composed folder,
    ``report.json``, ``report.md`` and two pictures. A folder that an earlier run made is replaced.

    Args:
        out: The folder.
        registry: Where base and experts go; None: a registry of its own below ``out``.
        quick: Take `QUICK` sizes.
        console: Where tables are printed; None: standard output.
        inputs: Anchor and texts; None: those of `DemoInputs.from_assets`, downloaded if need be.
        settings: Sizes; None: `FULL` or `QUICK`.

    Returns:
        What was found; ``figures()`` says which figures were reached.

    Raises:
        AssetError: Something could not be downloaded.
        DataError: ``out`` exists and is not of an earlier run.
        TrainingError: A job failed.
    """
    import composer.hf  # noqa: F401  tells transformers' Auto classes what a composed folder is
    from pipelines.cli.loading import quiet_transformers

    demo = _Demo(
        out=out,
        registry=registry,
        console=console or _stdout(),
        settings=settings or (QUICK if quick else FULL),
    )
    with quiet_transformers():
        return demo.run(inputs)


def _stdout() -> Console:
    from rich.console import Console

    return Console()


class _Demo:
    """One run. The methods are called in the order in which they stand."""

    def __init__(
        self, *, out: Path, registry: Registry | None, console: Console, settings: DemoSettings
    ) -> None:
        from registry import Registry

        self.out = out
        self.console = console
        self.settings = settings
        self.stages = Stages()
        _claim(out)
        self.registry = registry if registry is not None else Registry(out / "registry")
        self.composed = out / "composed"

    def run(self, inputs: DemoInputs | None) -> DemoReport:
        from pipelines.train.anchor import compute_dtype

        with self._stage("download", "Anchor and texts") as tell:

            def say(what: str) -> None:  # told only where something is not in the cache yet
                tell(what)
                self.console.print(what, highlight=False)

            self.inputs = inputs or DemoInputs.from_assets(progress=say)
        with self._stage("base", "The public anchor enters the registry"):
            self._add_base()
        self.dtype = compute_dtype(self.base.description)
        with self._stage("train", "Each owner trains on text that stays apart", live=True):
            folders = self._train()
        with self._stage("register", "The experts enter the registry"):
            for folder in folders:
                self.registry.register(folder)
        with self._stage("build", "A manifest becomes one model"):
            self._build()
        with self._stage("evaluate", "Every arm on the same held-out text") as tell:
            evaluations = self._evaluate(tell)
        report = self._report(evaluations)
        self.console.print(nll_table(report))
        self.console.print(routing_table(report))
        with self._stage("verify", "Opting out against never having joined") as tell:
            doors = self._verify(tell)
        with self._stage("generate", "The same prompt with and without its owner"):
            samples = self._generate()
        for sample in samples:
            self._print_text(f"With {sample.owner}", sample.prompt + sample.with_owner)
            self._print_text(f"Without {sample.owner}", sample.prompt + sample.without_owner)
        report = replace(report, verify_optout=doors, samples=samples, stages=self.stages.to_dict())
        report.write(self.out)
        self._print_figures(report)
        return report

    def _report(self, evaluations: dict[str, Evaluation]) -> DemoReport:
        sizes = self.settings
        return DemoReport(
            owners={owner.owner: owner.domain for owner in self.inputs.owners},
            evaluations=evaluations,
            unseen=tuple(self.inputs.unseen),
            settings=sizes,
            trained_tokens=sizes.steps * sizes.batch_size * sizes.sequence_length,
            dtype=self.dtype,
        )

    # ---------------------------------------------------------------- the steps

    def _add_base(self) -> None:
        from pipelines.train import public_routing
        from pipelines.train.anchor import resolve_base
        from pipelines.train.layer_choice import parse_layers

        name = self.inputs.base_name
        self.base = self.registry.add_base(self.inputs.anchor, name=name)
        self.layers = parse_layers(self.settings.layers, num_layers=self.base.description.num_layers)
        folder = self.out / "public-routing"
        with resolve_base(name, registry=self.registry) as base:
            public_routing(
                base,
                self.inputs.public,
                out=folder,
                layer=self.layers[0],
                sequence_length=self.settings.sequence_length,
                windows=self.settings.public_windows,
            )
        info = RoutingInfo.model_validate_json((folder / "routing.json").read_text())
        self.base = self.registry.set_base_routing(name, folder, info)

    def _train(self) -> list[Path]:
        from pipelines.cli.board import job_board
        from pipelines.train import DomainJob, train_jobs
        from pipelines.train.hub import raise_failures

        jobs = [DomainJob.from_file(self._write_job(owner)) for owner in self.inputs.owners]
        with job_board([job.name for job in jobs]) as report:
            outcomes = train_jobs(
                jobs,
                out_dir=self.out / "experts",
                registry=self.registry,
                runner=self.settings.runner,
                progress=report,
            )
        raise_failures(outcomes)
        folders = [outcome.folder for outcome in outcomes if outcome.folder is not None]
        if len(folders) != len(jobs):
            raise TrainingError("A job ended without an expert.")
        return folders

    def _write_job(self, owner: DemoOwner) -> Path:
        """Write the owner's text and job file into a folder of the owner's own."""
        folder = self.out / "owners" / owner.owner
        folder.mkdir(parents=True, mode=0o700)
        for name, documents in {"training": owner.training, "held-out": owner.held_out}.items():
            with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
                lines.writelines(json.dumps({"text": text}) + "\n" for text in documents)
        sizes = self.settings
        job = {
            "name": owner.name,
            "domain": owner.domain,
            "license": "Apache-2.0",
            "data_statement": owner.statement,
            "base": self.inputs.base_name,
            "layers": sizes.layers,
            "rank": sizes.rank,
            "data": "training.jsonl",
            "held_out": 0,
            "sequence_length": sizes.sequence_length,
            "batch_size": sizes.batch_size,
            "steps": sizes.steps,
            "workdir": "work",
        }
        path = folder / "job.yaml"
        path.write_text(yaml.safe_dump(job, sort_keys=False), encoding="utf-8")
        return path

    def _build(self) -> None:
        from composer import Manifest, build, plan

        manifest = {
            "format_version": 1,
            "name": "demo",
            "recipe": "flexolmo",
            "base": self.inputs.base_name,
            "experts": [owner.name for owner in self.inputs.owners],
        }
        path = self.out / "manifest.yaml"
        path.write_text(yaml.safe_dump(manifest, sort_keys=False), encoding="utf-8")
        planned = plan(Manifest.from_file(path), self.registry)
        build(planned, self.composed, registry=self.registry)

    def _evaluate(self, tell: Any) -> dict[str, Evaluation]:
        import torch

        from pipelines.demo.arms import Trunk, expert_deltas, measure_composed, measure_dense
        from pipelines.evaluate import prepare
        from pipelines.train.anchor import load_anchor, resolve_base

        sizes, description = self.settings, self.base.description
        texts = {owner.domain: owner.held_out for owner in self.inputs.owners}
        with resolve_base(self.inputs.base_name, registry=self.registry) as base:
            anchor, tokenizer = load_anchor(base, dtype=self.dtype)
        windows = prepare(
            {**texts, **self.inputs.unseen},
            tokenizer,
            sequence_length=sizes.sequence_length,
            max_tokens=sizes.measured_windows * sizes.sequence_length,
        )
        trunk = Trunk.from_anchor(
            anchor, windows, layers_prefix=description.layers_prefix, first=self.layers[0]
        )
        unseen = tuple(self.inputs.unseen)

        def report(arm: str, done: int, total: int) -> None:
            tell(f"{arm}: {done:,} of {total:,} tokens")

        deltas = {
            owner.name: expert_deltas(self.registry, owner.name, description) for owner in self.inputs.owners
        }
        results = measure_dense(trunk, anchor, deltas, unseen=unseen, report=report)
        del anchor, deltas
        dtype = getattr(torch, self.dtype)
        return results | measure_composed(trunk, self.composed, unseen=unseen, dtype=dtype, report=report)

    def _verify(self, tell: Any) -> dict[str, float]:
        from composer import verify_optout

        length = self.settings.verified_characters
        prompts = [owner.held_out[0][:length] for owner in self.inputs.owners]
        rows = verify_optout(self.composed, prompts=prompts, progress=tell)
        doors = dict.fromkeys(("build", "load", "request"), 0.0)
        for row in rows:
            doors[row.door] = max(doors[row.door], row.max_abs_diff)
        return doors

    def _generate(self) -> list[Sample]:
        import torch
        from transformers import AutoTokenizer

        import composer

        model = composer.load(self.composed, dtype=getattr(torch, self.dtype))
        tokenizer = AutoTokenizer.from_pretrained(self.composed, local_files_only=True)
        return [
            _sample(model, tokenizer, owner, new_tokens=self.settings.new_tokens)
            for owner in self.inputs.owners
        ]

    # ---------------------------------------------------------------- what is seen

    @contextmanager
    def _stage(self, name: str, what: str, *, live: bool = False) -> Iterator[Any]:
        """Time a step, show that it runs, and say that it is done."""
        from pipelines.cli.progress import spinner

        with self.stages(name):
            if live:  # it draws a table of its own
                yield None
            else:
                with spinner(what) as report:
                    yield report
        self.console.print(f"{what}: {self.stages.seconds[name]:.1f} s", highlight=False)

    def _print_figures(self, report: DemoReport) -> None:
        figures = report.figures()
        for figure in figures:
            mark = "reached" if figure.reached else "NOT REACHED"
            self.console.print(
                f"{mark}: {figure.name}: {figure.value:.4g} (bound {figure.bound:.4g} {figure.unit})",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        reached = sum(figure.reached for figure in figures)
        self.console.print(
            f"\n{reached} of {len(figures)} figures reached. Report: {self.out / 'report.md'}", soft_wrap=True
        )

    def _print_text(self, title: str, text: str) -> None:
        from rich.panel import Panel
        from rich.text import Text

        self.console.print(Panel(Text(text.rstrip()), title=title, title_align="left"))


def _claim(out: Path) -> None:
    """Create the folder, or empty it if an earlier run made it.

    Raises:
        DataError: It holds something else.
    """
    if out.is_dir() and (out / MARKER).is_file():
        shutil.rmtree(out)
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"'{out}' exists and was not made by the demo. Choose another folder with --out, or remove it."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).touch()


def _sample(model: Any, tokenizer: Any, owner: DemoOwner, *, new_tokens: int) -> Sample:
    """Continue the owner's prompt twice in one batch: with everybody, and without the owner."""
    import torch

    inputs = tokenizer([owner.prompt] * 2, return_tensors="pt")
    with torch.inference_mode():
        ids = model.generate(
            inputs.input_ids,
            attention_mask=inputs.attention_mask,
            opt_out=[set(), {owner.owner}],
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    texts: Sequence[str] = tokenizer.batch_decode(
        ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True
    )
    return Sample(owner=owner.owner, prompt=owner.prompt, with_owner=texts[0], without_owner=texts[1])
