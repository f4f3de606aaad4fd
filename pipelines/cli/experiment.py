"""``coterie experiment``: runs a comparison over seeds and writes its table, picture and JSON.

Knows how progress and results are shown; what is run is ``pipelines.experiments``.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.errors import resumable
from pipelines.cli.loading import quiet_transformers
from pipelines.cli.options import JsonOption, examples
from pipelines.cli.output import print_json, print_line, print_table

if TYPE_CHECKING:
    from pipelines.experiments.kind import ExperimentSettings
    from pipelines.experiments.results import Row

__all__ = ["group"]

group = typer.Typer(
    help="Run comparisons of arms over seeds.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("coterie experiment run experiments/flexolmo_tables.yaml"),
)

EXAMPLES = examples(
    "coterie experiment run experiments/flexolmo_tables.yaml --dry-run",
    "coterie experiment run experiments/flexolmo_tables.yaml",
    "coterie experiment run experiments/flexolmo_tables.yaml --seed 0 --arm anchor --arm coterie",
)


@group.command("run", epilog=EXAMPLES)
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The experiment's YAML.", show_default=False)],
    out: Annotated[
        Path, typer.Option("--out", metavar="FOLDER", help="Receives NAME.json, NAME.md and NAME.png.")
    ] = Path("docs/results"),
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="FOLDER",
            help="Keeps the anchor, experts and finished cells; by default experiment-NAME.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Only these seeds; may be given several times.", show_default=False),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", help="Only these arms; may be given several times.", show_default=False),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            min=1,
            help="Seeds at once, each in a process of its own, where they are small; by default one more than "
            "there are cores. 1: one after another.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and stop.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Run every arm of a comparison under every seed.

    Each arm under each seed is a cell; finished cells are kept in the work folder, so the same command goes on
    where it stopped. Owners' experts are trained as by `coterie train`, in registries of the experiment's own.
    """
    from pipelines.experiments.kind import kind_of, read_experiment

    experiment = _narrowed(read_experiment(file), seed, arm)
    folder = work or Path(f"experiment-{experiment.name}")
    if dry_run:
        _show_cells(experiment, folder, as_json=as_json)
        return
    rows = _run(experiment, folder, jobs=jobs or (os.cpu_count() or 1) + 1)
    paths = kind_of(experiment).write(experiment, rows, out=out)
    if as_json:
        print_json({"rows": [asdict(row) for row in rows], "files": [str(path) for path in paths]})
        return
    _show(experiment, rows)
    print_line("Written: " + ", ".join(str(path) for path in paths) + ".")


def _narrowed(
    experiment: ExperimentSettings, seeds: list[int] | None, arms: list[str] | None
) -> ExperimentSettings:
    data = experiment.to_dict()
    if seeds:
        data["seeds"] = seeds
    if arms:
        data["arms"] = arms
    return type(experiment).from_dict(data)


def _show_cells(experiment: ExperimentSettings, work: Path, *, as_json: bool) -> None:
    from pipelines.experiments.runner import cells

    todo = cells(experiment, work=work)
    if as_json:
        print_json([asdict(cell) for cell in todo])
        return
    print_table(
        [(cell.seed, cell.arm, "yes" if cell.done else "no") for cell in todo],
        columns=("SEED", "ARM", "DONE"),
        empty="There is nothing to run.",
        right=("SEED",),
    )


def _run(experiment: ExperimentSettings, work: Path, *, jobs: int) -> list[Row]:
    from pipelines.cli.progress import on_terminal, spinner
    from pipelines.experiments.runner import Cell, run_experiment

    advice = f"finished cells are kept in {work}; the same command goes on from there."
    with resumable(advice), quiet_transformers(), spinner("Experiment") as doing:
        current = ""

        def on_cell(cell: Cell, number: int, total: int) -> None:
            nonlocal current
            current = f"{number} of {total}: seed {cell.seed}, {cell.arm}"
            doing(current)
            if not on_terminal() and not cell.done:
                typer.echo(current, err=True)

        return run_experiment(
            experiment, work=work, jobs=jobs, tell=lambda what: doing(f"{current}: {what}"), on_cell=on_cell
        )


def _show(experiment: ExperimentSettings, rows: list[Row]) -> None:
    from pipelines.experiments.kind import kind_of
    from pipelines.experiments.results import summarize

    kind = kind_of(experiment)
    summary = summarize(rows, owned=kind.owned(experiment), metric=kind.metric)
    columns = ("ARM", *(domain.upper() for domain in summary.domains))
    lines = [
        (arm, *(f"{cells[d][0]:.3f} ± {cells[d][1]:.3f}" if d in cells else None for d in summary.domains))
        for arm, cells in summary.cells.items()
    ]
    print_table(lines, columns=columns, empty="There are no results.", right=columns[1:])
