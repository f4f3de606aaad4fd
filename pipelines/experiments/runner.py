"""Runs an experiment cell by cell: one arm under one seed. What is done is kept, so that the same call goes on.

Knows files and order; knows nothing of what an arm does.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experts.errors import DataError
from experts.files import write_atomic
from pipelines.experiments.kind import ExperimentSettings, kind_of
from pipelines.experiments.results import Row
from pipelines.experiments.world import Tell

__all__ = ["Cell", "cells", "run_experiment"]

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
    tell: Tell | None = None,
    on_cell: Callable[[Cell, int, int], None] | None = None,
) -> list[Row]:
    """Run the cells that are not done; return all rows.

    Args:
        experiment: What to run.
        work: Folder for the anchor, registries, experts and finished cells.
        texts: What all seeds share, as the kind's ``texts`` returns it; None: fetched.
        tell: Told what is going on inside a cell.
        on_cell: Called before each cell with its number and the number of cells.

    Raises:
        DataError: The folder belongs to another experiment.
        CoterieError: A cell failed; finished ones are kept.
    """
    _claim(experiment, work)
    kind = kind_of(experiment)
    todo = cells(experiment, work=work)
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
