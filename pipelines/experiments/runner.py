"""Runs an experiment cell by cell: one arm under one seed. What is done is kept, so that the same call goes on.

Knows files and order; knows nothing of what an arm does.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experts.errors import DataError
from experts.files import write_atomic
from pipelines.experiments.kind import EXPERIMENT_KINDS, ExperimentSettings, kind_of
from pipelines.experiments.parallel import Message, SeedTask, run_tasks
from pipelines.experiments.results import Row
from pipelines.experiments.world import Tell

__all__ = ["Cell", "cells", "run_experiment", "run_seed"]

_SETTINGS = "experiment.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One arm under one seed.

    Attributes:
        seed: The seed.
        arm: The arm's name in the table of arms.
        done: Whether its rows are there already.
    """

    seed: int
    arm: str
    done: bool


def cells(experiment: ExperimentSettings, *, work: Path) -> list[Cell]:
    """List what an experiment consists of, in the order in which it is run."""
    arms = experiment.arms or tuple(kind_of(experiment).arms.builtin)
    return [
        Cell(seed=seed, arm=arm, done=_cell_file(work, seed, arm).is_file())
        for seed in experiment.seeds
        for arm in arms
    ]


def run_experiment(
    experiment: ExperimentSettings,
    *,
    work: Path,
    texts: Any = None,
    jobs: int = 1,
    tell: Tell | None = None,
    on_cell: Callable[[Cell, int, int], None] | None = None,
) -> list[Row]:
    """Run the cells that are not done; return all rows.

    Args:
        experiment: What to run.
        work: Folder for the anchor, registries, experts and finished cells.
        texts: What all seeds share, as the kind's ``texts`` returns it; None: fetched.
        jobs: Seeds at once, each in a process of its own where the kind allows it.
        tell: Told what is going on inside a cell.
        on_cell: Called before each cell with its number and the number of cells.

    Raises:
        DataError: The folder belongs to another experiment.
        CoterieError: A cell failed; finished ones are kept.
    """
    _claim(experiment, work)
    kind = kind_of(experiment)
    todo = cells(experiment, work=work)
    seeds = [seed for seed in experiment.seeds if any(c.seed == seed and not c.done for c in todo)]
    if jobs > 1 and len(seeds) > 1:
        texts = texts or kind.texts(experiment, tell=tell)
        if kind.prepare(experiment, texts, folder=work, tell=tell):
            _side_by_side(experiment, todo, seeds, work, texts, jobs=jobs, tell=tell, on_cell=on_cell)
            return [row for cell in todo for row in _read(work, cell)]
    world = None
    for number, cell in enumerate(todo, start=1):
        if on_cell is not None:
            on_cell(cell, number, len(todo))
        if cell.done:
            continue
        texts = texts or kind.texts(experiment, tell=tell)
        if world is None or world.seed != cell.seed:
            world = kind.world(experiment, texts, folder=work, seed=cell.seed, tell=tell)
        rows = list(kind.run(world, cell.arm))
        data = json.dumps([asdict(row) for row in rows])
        _cell_file(work, cell.seed, cell.arm).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_cell_file(work, cell.seed, cell.arm), data.encode())
        gc.collect()
    return [row for cell in todo for row in _read(work, cell)]


def _side_by_side(
    experiment: ExperimentSettings,
    todo: Sequence[Cell],
    seeds: Sequence[int],
    work: Path,
    texts: Any,
    *,
    jobs: int,
    tell: Tell | None,
    on_cell: Callable[[Cell, int, int], None] | None,
) -> None:
    """Run every seed in a process of its own; cells are counted as they are begun."""
    jobs = min(jobs, len(seeds))
    begun = sum(cell.done for cell in todo)
    doing: dict[int, str] = {}

    def on_message(message: Message) -> None:
        nonlocal begun
        if message.about == "cell":
            begun += 1
            if on_cell is not None:
                on_cell(message.what, begun, len(todo))
        elif tell is not None:
            doing[message.seed] = f"seed {message.seed}, {message.what}"
            tell("; ".join(doing[seed] for seed in sorted(doing)))

    run_tasks(
        [
            SeedTask(
                seed=seed,
                run=f"{__name__}:run_seed",
                threads=max(1, (os.cpu_count() or 1) // jobs),
                arguments={
                    "settings": experiment.to_dict() | {"seeds": [seed]},
                    "work": work,
                    "texts": texts,
                },
            )
            for seed in seeds
        ],
        jobs=jobs,
        on_message=on_message,
    )


def run_seed(
    settings: dict[str, Any], work: Path, texts: Any, *, send: Callable[[str, object], None]
) -> None:
    """Run one seed's cells in a process that was started for it; see `run_experiment`.

    Args:
        settings: The experiment as plain data, with this seed alone.
        work: As for `run_experiment`.
        texts: As for `run_experiment`.
        send: Takes ``"cell"`` and the cell before each that is run, and ``"tell"`` and words on what is going on.
    """
    experiment = EXPERIMENT_KINDS.load(settings["kind"]).settings.from_dict(settings)

    def on_cell(cell: Cell, number: int, total: int) -> None:
        if not cell.done:
            send("cell", cell)

    run_experiment(experiment, work=work, texts=texts, tell=lambda what: send("tell", what), on_cell=on_cell)


def _cell_file(work: Path, seed: int, arm: str) -> Path:
    return work / f"seed-{seed}" / "results" / f"{arm}.json"


def _read(work: Path, cell: Cell) -> list[Row]:
    return [Row(**row) for row in json.loads(_cell_file(work, cell.seed, cell.arm).read_text())]


def _claim(experiment: ExperimentSettings, work: Path) -> None:
    """Make the folder this experiment's, or check that it is; seeds and arms may be added later."""
    settings = experiment.to_dict()
    for key in ("seeds", "arms", "kind", *experiment.FREE):
        settings.pop(key)
    path = work / _SETTINGS
    if path.is_file():
        before = json.loads(path.read_text())
        if before != settings:
            changed = sorted(key for key in {*settings, *before} if before.get(key) != settings.get(key))
            raise DataError(
                f"{work} holds results of '{before.get('name')}' with other settings ({', '.join(changed)}). Choose "
                "another --work folder, or remove it."
            )
        return
    if work.is_dir() and any(work.iterdir()):
        raise DataError(f"{work} is not empty and no experiment's. Choose another --work folder.")
    work.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(settings, indent=1) + "\n").encode())
