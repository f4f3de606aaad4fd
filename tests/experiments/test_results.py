"""Tables made of rows: means and deviations over seeds, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.evaluate import DomainScore, Evaluation
from pipelines.experiments import Experiment
from pipelines.experiments.results import Row, rows_of, summarize, write_results


def _row(arm: str, seed: int, domain: str, value: float, metric: str = "nll") -> Row:
    return Row(arm=arm, seed=seed, domain=domain, split="heldout", metric=metric, value=value)


def test_a_summary_is_mean_and_deviation_over_seeds() -> None:
    rows = [
        *(_row("a", seed, "python", value) for seed, value in enumerate((1.0, 2.0, 3.0))),
        *(_row("a", seed, "icd10", value) for seed, value in enumerate((3.0, 3.0, 9.0))),
        _row("a", 0, "stories", 7.0),
        _row("b", 0, "python", 4.0),
        _row("a", 0, "python", 0.5, metric="routed_to_owner"),
    ]
    summary = summarize(rows, owned=["python", "icd10"])
    assert summary.domains == ("python", "icd10", "mean", "stories")
    assert summary.cells["a"]["python"] == (2.0, 1.0)
    assert summary.cells["a"]["icd10"] == (5.0, pytest.approx(12**0.5))
    # seed by seed: 2.0, 2.5, 6.0
    assert summary.cells["a"]["mean"] == (3.5, pytest.approx(4.75**0.5))
    assert summary.cells["a"]["stories"] == (7.0, 0.0)
    assert "mean" not in summary.cells["b"]


def _score(nll: float, routing: dict[str, float], sent: dict[str, float] | None = None) -> DomainScore:
    fields: dict[str, Any] = {"nll": nll, "bits_per_byte": nll / 2, "tokens": 10, "seconds": 1.0}
    return DomainScore(**fields, routing=routing, sent=sent or {})


def test_rows_of_an_evaluation() -> None:
    evaluation = Evaluation(
        opt_out=(),
        domains={
            "python": replace(
                _score(2.0, {"p": 0.75, "anchor": 0.25}, {"p": 0.9, "anchor": 0.1}),
                load={"anchor": 1.0, "p/code": 0.5, "p/more": 0.25, "pp/x": 0.25},
                router_entropy=0.3,
            ),
            "stories": _score(3.0, {"p": 1.0}),
        },
    )
    rows = rows_of("arm", 5, evaluation, owners={"python": "p"})
    assert [(r.arm, r.seed, r.domain, r.split, r.metric, r.value) for r in rows] == [
        ("arm", 5, "python", "heldout", "nll", 2.0),
        ("arm", 5, "python", "heldout", "bits_per_byte", 1.0),
        ("arm", 5, "python", "heldout", "routed_to_owner", 0.75),
        ("arm", 5, "python", "heldout", "routing_accuracy", 0.9),
        ("arm", 5, "python", "heldout", "owner_load", 0.75),
        ("arm", 5, "python", "heldout", "router_entropy", 0.3),
        ("arm", 5, "stories", "heldout", "nll", 3.0),
        ("arm", 5, "stories", "heldout", "bits_per_byte", 1.5),
    ]


def test_what_is_written(tiny: Experiment, tmp_path: Path) -> None:
    domains = ("python", "icd10", "stories")
    rows = [
        _row(arm, 0, domain, value)
        for arm, value in (("anchor", 3.0), ("coterie", 2.0))
        for domain in domains
    ]
    paths = write_results(tiny, rows, out=tmp_path / "results")
    assert [path.name for path in paths] == ["tiny.json", "tiny.md", "tiny.png"]
    data = json.loads(paths[0].read_text())
    assert data["rows"][0] == {
        "arm": "anchor", "seed": 0, "domain": "python", "split": "heldout", "metric": "nll", "value": 3.0
    }  # fmt: skip
    assert data["settings"] == tiny.to_dict()
    assert (
        "| coterie | 2.000 ± 0.000 | 2.000 ± 0.000 | 2.000 ± 0.000 | 2.000 ± 0.000 |" in paths[1].read_text()
    )
    assert paths[2].read_bytes().startswith(b"\x89PNG")
