from dataclasses import replace

import pytest

from pipelines.demo.report import DemoReport, Figure
from pipelines.demo.settings import FULL
from pipelines.evaluate import DomainScore, Evaluation

OWNERS = {"acme": "law", "bob": "code"}
GOOD = {
    "anchor": (3.0, 2.6),
    "expert:acme/law": (2.0, 2.7),
    "expert:bob/code": (3.1, 2.2),
    "weight_average": (2.5, 2.4),
    "composed": (2.04, 2.21),
    "composed-without:acme": (2.98, 2.22),
    "never-joined:acme": (2.98, 2.22),
    "composed-without:bob": (2.03, 2.61),
    "never-joined:bob": (2.03, 2.61),
}


def _evaluation(values):
    scores = {
        domain: DomainScore(nll=nll, bits_per_byte=nll, tokens=10, seconds=1.0, routing={"anchor": 1.0})
        for domain, nll in zip(OWNERS.values(), values, strict=True)
    }
    return Evaluation(opt_out=(), domains=scores)


def _report(**changed):
    return DemoReport(
        owners=OWNERS,
        evaluations={arm: _evaluation(values) for arm, values in {**GOOD, **changed}.items()},
        unseen=(),
        settings=FULL,
        trained_tokens=1,
        dtype="float32",
        verify_optout={"build": 0.0, "load": 0.0, "request": 9e-6},
    )


def test_every_figure_is_reached():
    figures = _report().figures()
    assert [figure.reached for figure in figures] == [True] * 11
    values = {figure.name: figure.value for figure in figures}
    assert values["mean of the composition against the anchor"] == pytest.approx(2.125)
    assert values["law: composition above the best single expert"] == pytest.approx(0.04)
    assert values["other domains without acme: largest move"] == pytest.approx(0.01)
    assert values["code without bob: from never-joined"] == 0


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({"anchor": (2.0, 2.2)}, ["mean of the composition against the anchor"]),
        ({"weight_average": (2.0, 2.2)}, ["mean of the composition against the weight average"]),
        ({"expert:acme/law": (1.98, 2.7)}, ["law: composition above the best single expert"]),
        ({"never-joined:acme": (2.9, 2.22)}, ["law without acme: from never-joined"]),
        (
            {"composed-without:bob": (2.1, 2.61), "never-joined:bob": (2.1, 2.61)},
            ["other domains without bob: largest move"],
        ),
    ],
    ids=["anchor", "average", "own", "never-joined", "others"],
)
def test_a_figure_that_is_missed_is_named(changed, missed):
    assert [figure.name for figure in _report(**changed).figures() if not figure.reached] == missed


@pytest.mark.parametrize(
    ("door", "value", "reached"),
    [("build", 1e-9, False), ("load", 1e-9, False), ("request", 1e-5, True), ("request", 1.1e-5, False)],
)
def test_doors_have_bounds_of_their_own(door, value, reached):
    report = replace(_report(), verify_optout={door: value})
    assert report.figures()[-1] == Figure(
        name=f"opt-out at {door}: largest logit difference",
        value=value,
        bound=1e-5 if door == "request" else 0.0,
        reached=reached,
        unit="logits",
    )


def test_the_page_says_what_was_not_reached(tmp_path):
    _report(anchor=(2.0, 2.2)).write(tmp_path)
    page = (tmp_path / "report.md").read_text()
    assert "10 of 11 figures reached." in page
    assert "| mean of the composition against the anchor | 2.125 | 2.1 | **no** |" in page
    assert "| composed | 2.040 | 2.210 | 2.125 |" in page


def test_unseen_domains_stay_apart():
    evaluations = {arm: _evaluation(values) for arm, values in GOOD.items()}
    for arm in ("anchor", "composed"):
        seen = evaluations[arm].domains
        evaluations[arm] = Evaluation(opt_out=(), domains={**seen, "news": next(iter(seen.values()))})
    report = replace(_report(), evaluations=evaluations, unseen=("news",))
    assert all(list(row) == ["law", "code"] for row in report.nll.values())
    assert report.unseen_nll == {"anchor": {"news": 3.0}, "composed": {"news": 2.04}}
