"""Seeds side by side: the same rows as one after another, and nothing that fails is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.errors import ManifestError
from pipelines.experiments import Experiment
from pipelines.experiments.parallel import SeedTask, run_tasks
from pipelines.experiments.runner import Cell, run_experiment
from pipelines.experiments.world import Texts


def test_side_by_side_is_one_after_another(tiny: Experiment, tiny_texts: Texts, tmp_path: Path) -> None:
    two = tiny.model_copy(update={"seeds": (0, 1), "arms": ("anchor",)})
    begun: list[tuple[Cell, int, int]] = []
    rows = run_experiment(
        two,
        work=tmp_path / "at-once",
        texts=tiny_texts,
        jobs=2,
        on_cell=lambda cell, number, total: begun.append((cell, number, total)),
    )
    assert rows == run_experiment(two, work=tmp_path / "in-turn", texts=tiny_texts)
    assert {cell.seed for cell, _, _ in begun} == {0, 1}
    assert [(number, total) for _, number, total in begun] == [(1, 2), (2, 2)]
    assert run_experiment(two, work=tmp_path / "at-once", jobs=2) == rows  # nothing is left to do


def test_a_failure_is_raised_when_the_others_have_ended(capfd: pytest.CaptureFixture[str]) -> None:
    refused = SeedTask(
        seed=3,
        threads=1,
        run="pipelines.experiments.runner:run_seed",
        arguments={"settings": {"kind": "flexolmo"}, "work": Path("nowhere"), "texts": None},
    )
    broken = SeedTask(seed=4, threads=1, run="pipelines.experiments.runner:no_such_function")
    with pytest.raises(ManifestError) as caught:
        run_tasks([refused], jobs=2, on_message=pytest.fail)
    assert str(caught.value) == (
        "experiment has 3 problems:\n  - name: missing\n  - domains: missing\n  - public: missing"
    )
    with pytest.raises(RuntimeError) as ended:
        run_tasks([broken], jobs=1, on_message=pytest.fail)
    assert str(ended.value) == (
        "The process of seed 4 ended with code 1. Finished cells are kept; if the machine is short of memory, run "
        "fewer seeds at once with --jobs."
    )
    assert "no_such_function" in capfd.readouterr().err  # a bug shows where it is
