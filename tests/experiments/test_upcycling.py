"""The upcycling comparison on a tiny world: every arm is measured and counted, and its tables follow from the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from composer.lock import Lock
from experts.errors import CoterieError
from pipelines.evaluate import DomainScore, Evaluation
from pipelines.experiments.kind import kind_of
from pipelines.experiments.results import Row
from pipelines.experiments.runner import run_experiment
from pipelines.experiments.settings import ScratchAnchor
from pipelines.experiments.upcycling.arms import ARMS, Measured
from pipelines.experiments.upcycling.comparison import UpcyclingComparison, costs, wins
from pipelines.experiments.upcycling.compute import Shape, flops_per_token
from pipelines.experiments.upcycling.settings import UpcyclingExperiment
from pipelines.experiments.world import Texts

SETTINGS: dict[str, Any] = {
    "name": "small",
    "anchor": {
        "family": "llama",
        "vocabulary": 280,
        "hidden_size": 16,
        "intermediate_size": 32,
        "layers": 1,
        "heads": 2,
        "steps": 8,
        "batch_size": 4,
    },
    "domains": ["python", "icd10"],
    "general": "history",
    "sequence_length": 16,
    "held_out_windows": 2,
    "experts": {"steps": 6, "batch_size": 2, "learning_rate": 0.01},
    "mixture": {"steps": 3, "batch_size": 2, "learning_rate": 0.01},
    "seeds": [0],
}


@pytest.fixture(scope="module")
def small() -> UpcyclingExperiment:
    return UpcyclingExperiment.from_dict(SETTINGS)


@pytest.fixture(scope="module")
def done(
    small: UpcyclingExperiment, tiny_texts: Texts, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Row]]:
    work = tmp_path_factory.mktemp("upcycling") / "work"
    held_out = {**tiny_texts.held_out, "history": tiny_texts.public[:4]}
    texts = Texts(
        owned=tiny_texts.owned,
        held_out={name: held_out[name] for name in ("python", "icd10", "history")},
        public=tiny_texts.public,
    )
    return work, run_experiment(small, work=work, texts=texts)


def _nll(rows: list[Row], arm: str) -> dict[str, float]:
    return {row.domain: row.value for row in rows if row.arm == arm and row.metric == "nll"}


def test_every_arm_is_measured_and_counted(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    arms = {row.arm for row in rows}
    assert arms == {*ARMS, "expert:python", "expert:icd10"} - {"expert"}
    assert all(set(_nll(rows, arm)) == {"python", "icd10", "history"} for arm in arms)
    assert costs(rows).keys() == arms
    sent = {row.arm for row in rows if row.metric == "routed_to_owner"}
    # everybody's text trains all of the copies, so none of them is an owner's
    assert sent == {arm for arm in arms if arm.startswith(("btx_", "bam_"))}


def test_owners_learn_their_domains_and_mixtures_are_trained(done: tuple[Path, list[Row]]) -> None:
    _, rows = done
    seed = _nll(rows, "seed")
    for domain in ("python", "icd10"):
        assert _nll(rows, f"expert:{domain}")[domain] < seed[domain]
        assert _nll(rows, "unrestricted")[domain] < seed[domain]
    mixtures = ["btx_top1", "btx_top2", "btx_soft", "btx_active_matched", "bam_own_kv", "bam_shared_kv"]
    assert len({_nll(rows, arm)["python"] for arm in mixtures}) == len(mixtures)


def test_what_the_arms_cost(done: tuple[Path, list[Row]]) -> None:
    work, rows = done
    found = costs(rows)
    each, step = 6 * 2 * 16, 2 * 16
    assert found["seed"]["training_tokens"] == 0
    assert found["expert:icd10"]["training_tokens"] == each
    assert found["btm"]["flops_per_token"] == 3 * found["seed"]["flops_per_token"]
    equal = ["btx_top1", "btx_soft", "btx_active_matched", "bam_own_kv", "bam_shared_kv"]
    assert {found[arm]["training_tokens"] for arm in equal} == {2 * each + 3 * step}
    # trained together from the start: as many tokens in all, none of them by an owner alone
    assert found["unrestricted"]["training_tokens"] == 2 * each + 3 * step
    for kv in ("own", "shared"):
        ratio = found[f"bam_{kv}_kv"]["flops_per_token"] / found["btx_top1"]["flops_per_token"]
        steps = round(3 / ratio)
        assert found[f"bam_{kv}_kv_equal_compute"]["training_tokens"] == 2 * each + steps * step
    lock = Lock.read(work / "seed-0" / "tuned" / "bam_own_kv")
    assert lock.tuned is not None
    assert (lock.optout_class, lock.tuned.owners) == ("retrain", ("icd10-owner", "python-owner"))


def test_what_is_written(done: tuple[Path, list[Row]], small: UpcyclingExperiment, tmp_path: Path) -> None:
    _, rows = done
    paths = kind_of(small).write(small, rows, out=tmp_path)
    assert [path.name for path in paths] == ["small.json", "small.md", "small.png"]
    data = json.loads(paths[0].read_text())
    assert {row["metric"] for row in data["rows"]} >= {"nll", "training_tokens", "training_flops"}
    text = paths[1].read_text()
    assert "`mean` is over python, icd10, history." in text
    assert "| bam_own_kv | btx_active_matched | " in text
    assert f"| seed | 0 | 0.00 | {costs(rows)['seed']['flops_per_token'] / 1e6:.2f} | " in text


def test_arithmetic_of_the_paper() -> None:
    """FLOPs a token and layer of the 590M model (arXiv 2408.08274, table 9), without head and routers."""
    anchor = ScratchAnchor(family="llama", hidden_size=1024, intermediate_size=2048, layers=6, vocabulary=256)

    def layer(**shape: Any) -> float:
        routers = 2 * shape["seats"] * 1024 * (2 if shape.get("attention", 1) > 1 else 1)
        total = flops_per_token(anchor, Shape(**shape), context=256) - 2 * 256 * 1024
        return total / 6 - routers

    attention = layer(seats=4, attention=4) - 6 * 1024 * 2048
    assert attention == 35_651_584
    assert layer(seats=4) / 1e6 == pytest.approx(21.5, abs=0.05)
    assert layer(seats=4, attention=4) / 1e6 == pytest.approx(48.3, abs=0.1)
    assert layer(seats=6, ffn=3) / 1e6 == pytest.approx(46.7, abs=0.05)


def test_wins_are_counted_seed_by_seed() -> None:
    def row(arm: str, seed: int, domain: str, value: float) -> Row:
        return Row(arm=arm, seed=seed, domain=domain, split="heldout", metric="nll", value=value)

    values = {"a": [(1.0, 3.0), (2.0, 2.0), (4.0, 4.0)], "b": [(2.0, 2.5), (2.0, 2.0), (3.0, 3.0)]}
    rows = [
        row(arm, seed, domain, value)
        for arm, seeds in values.items()
        for seed, pair in enumerate(seeds)
        for domain, value in zip(("x", "y"), pair, strict=True)
    ]
    won, seeds, difference = wins([*rows, row("a", 3, "x", 0.0)], arm="a", against="b", owned=("x", "y"))
    assert (won, seeds) == (2, 3)  # 2.0 to 2.25, a tie, 4 to 3; the fourth seed is not complete
    assert difference == pytest.approx((-0.25 + 0 + 1) / 3)


def test_rows_of_an_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    score: Any = {"nll": 2.0, "bits_per_byte": 1.0, "tokens": 10, "seconds": 1.0, "routing": {}}
    evaluation = Evaluation(opt_out=(), domains={"python": DomainScore(**score)})
    measured = Measured(evaluation=evaluation, tokens=7, training_flops=21, flops=3, parameters=5)
    monkeypatch.setattr(ARMS, "load", lambda name: lambda world: {name: measured})

    class Nowhere:
        seed = 4
        settings = UpcyclingExperiment.from_dict(SETTINGS)

        def owner(self, domain: str) -> str:
            return domain

    world: Any = Nowhere()
    found = {row.metric: (row.arm, row.seed, row.value) for row in UpcyclingComparison().run(world, "soup")}
    assert found == {
        "nll": ("soup", 4, 2.0),
        "bits_per_byte": ("soup", 4, 1.0),
        "training_tokens": ("soup", 4, 7.0),
        "training_flops": ("soup", 4, 21.0),
        "flops_per_token": ("soup", 4, 3.0),
        "parameters": ("soup", 4, 5.0),
    }


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"general": "python"}, "python: a domain cannot be the general text as well"),
        ({"domains": ["python"]}, "name at least two domains"),
        ({"general": "histor"}, "Unknown domain text 'histor'. Did you mean 'history'?"),
        ({"mixture": {"step": 3}}, "mixture.step: unknown key; did you mean 'steps'?"),
        ({"arms": ["bam"]}, "Unknown upcycling arm 'bam'."),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CoterieError) as caught:
        UpcyclingExperiment.from_dict({**SETTINGS, **change})
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2
