"""Cells: all arms run on a tiny world with a text of one's own, finished ones are kept, and a folder belongs to one
experiment.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experts.errors import DataError, TrainingError
from pipelines.experiments import Experiment
from pipelines.experiments.arms import ARMS
from pipelines.experiments.results import Row
from pipelines.experiments.runner import Cell, cells, run_experiment
from pipelines.experiments.world import Texts


@pytest.fixture(scope="module")
def own(
    tiny_settings: dict[str, Any], tiny_texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> Experiment:
    """The tiny experiment with a domain in files beside its YAML."""
    folder = tmp_path_factory.mktemp("own")
    for file, documents in {"train": tiny_texts.owned["icd10"], "test": tiny_texts.held_out["icd10"]}.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (folder / f"charts-{file}.jsonl").write_text("".join(lines))
    charts = {"name": "charts", "text": ["charts-train*.jsonl"], "held_out": "charts-test.jsonl"}
    (folder / "own.yaml").write_text(json.dumps({**tiny_settings, "domains": ["python", charts]}))
    return Experiment.from_file(folder / "own.yaml")


@pytest.fixture(scope="module")
def done(
    own: Experiment, tiny_fetch: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    work = tmp_path_factory.mktemp("experiment") / "work"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("pipelines.assets.domain_text", tiny_fetch)
        return work, run_experiment(own, work=work)


def _nll(rows: list[Row], arm: str) -> dict[str, float]:
    return {row.domain: row.value for row in rows if row.arm == arm and row.metric == "nll"}


def test_every_arm_is_measured_on_every_domain(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    arms = {row.arm for row in rows}
    several = {"expert": "expert:python", "without": "coterie-without:charts"}
    assert {several.get(name, name) for name in ARMS} <= arms
    assert all(set(_nll(rows, arm)) == {"python", "charts", "stories"} for arm in arms)


def test_leaving_an_owner_out_is_never_having_had_them(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    for domain in ("python", "charts"):
        never = _nll(rows, f"never-joined:{domain}")
        assert _nll(rows, f"coterie-without:{domain}") == pytest.approx(never, abs=1e-6)
        assert never != _nll(rows, "coterie")


def test_the_oracle_is_each_domains_own_expert(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    oracle = _nll(rows, "oracle")
    for domain in ("python", "charts"):
        assert oracle[domain] == pytest.approx(_nll(rows, f"expert:{domain}")[domain], abs=1e-6)


def test_training_moves_what_it_should(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    anchor = _nll(rows, "anchor")
    for domain in ("python", "charts"):
        assert _nll(rows, f"expert:{domain}")[domain] < anchor[domain]
        assert _nll(rows, "unrestricted_1x")[domain] < anchor[domain]
    assert _nll(rows, "paper_rt") != _nll(rows, "paper")
    assert _nll(rows, "btx_joint") != _nll(rows, "btx_public")


def test_finished_cells_are_not_run_again(
    done: tuple[Path, list[Row]], own: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, rows = done
    monkeypatch.setattr(ARMS, "load", lambda name: pytest.fail(f"{name} ran again"))
    assert run_experiment(own, work=work) == rows
    assert all(cell.done for cell in cells(own, work=work))


def test_more_cells_need_the_same_text(
    done: tuple[Path, list[Row]], own: Experiment, tiny_fetch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, _ = done
    monkeypatch.setattr("pipelines.assets.domain_text", tiny_fetch)
    more = own.model_copy(update={"seeds": (1,), "arms": ("anchor",)})
    charts = Path(own.own_texts[0].held_out[0])
    before = charts.read_text()
    charts.write_text(before + '{"text": "one more"}\n')
    with pytest.raises(DataError) as caught:
        run_experiment(more, work=work)
    assert str(caught.value) == (
        f"{work} holds results on other text (charts (held out)). Put the files back, or choose another --work folder."
    )
    charts.write_text(before)
    assert {row.domain for row in run_experiment(more, work=work)} == {"python", "charts", "stories"}


def test_a_cell_that_fails_loses_no_other(
    tiny: Experiment, tiny_texts: Texts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arms(name: str) -> Any:
        def run(world: Any) -> Any:
            if name == "coterie":
                raise TrainingError("no")
            return {}

        return run

    monkeypatch.setattr(ARMS, "load", arms)
    two = tiny.model_copy(update={"arms": ("anchor", "coterie")})
    with pytest.raises(TrainingError):
        run_experiment(two, work=tmp_path / "work", texts=tiny_texts)
    assert cells(two, work=tmp_path / "work") == [
        Cell(seed=0, arm="anchor", done=True),
        Cell(seed=0, arm="coterie", done=False),
    ]


def test_a_folder_belongs_to_one_experiment(
    done: tuple[Path, list[Row]], own: Experiment, tiny: Experiment, tmp_path: Path
) -> None:
    work, _ = done
    other = own.model_copy(update={"top_k": 1})
    with pytest.raises(DataError) as caught:
        run_experiment(other, work=work)
    assert str(caught.value) == (
        f"{work} holds results of 'tiny' with other settings (top_k). Choose another --work folder, or remove it."
    )
    (tmp_path / "something").write_text("else")
    with pytest.raises(DataError) as caught:
        run_experiment(tiny, work=tmp_path)
    assert str(caught.value) == f"{tmp_path} is not empty and no experiment's. Choose another --work folder."
