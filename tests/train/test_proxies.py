"""Proxies: they look like the owner's text, and nobody else's text has a say in them."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from experts.errors import DataError
from pipelines.train.proxies import DomainClassifier, choose_proxies, resemblance

WORDS = {
    "law": "licence licensee warranty shall hereby terms grant notice copyright liable",
    "code": "def return import self class yield lambda None True assert",
    "prose": "the a of and river house morning walked evening garden",
}


def _documents(kind: str, *, count: int, seed: int) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS[kind].split(), k=30)) for _ in range(count)]


@pytest.fixture(scope="module")
def public() -> list[str]:
    """Forty public documents, every tenth of them like an owner's, by turns."""
    documents = _documents("prose", count=40, seed=0)
    for position in range(0, 40, 10):
        documents[position] = _documents("law" if position % 20 else "code", count=1, seed=50 + position)[0]
    return documents


@pytest.fixture(scope="module")
def odds(public) -> np.ndarray:
    """How much every public document looks like the lawyer's."""
    return resemblance(_documents("law", count=20, seed=1), public)


def test_each_owner_finds_what_looks_like_their_own(public, odds) -> None:
    assert set(np.argsort(-odds)[:2]) == {10, 30}
    assert set(choose_proxies(_documents("code", count=20, seed=2), public, count=2)) == {0, 20}


def test_the_classifier_agrees_with_a_count_of_words(public, odds) -> None:
    vocabulary = set(WORDS["law"].split())
    shares = np.array([np.mean([word in vocabulary for word in text.split()]) for text in public])
    assert odds[shares > 0.5].min() > odds[shares < 0.5].max()


def test_who_judges_a_document_was_not_shown_it_as_public(public, odds) -> None:
    """A control: a classifier that was shown the lookalikes as public ones doubts them far more."""
    shown = DomainClassifier(_documents("law", count=20, seed=1), public).log_odds(public)
    assert (odds[[10, 30]] > shown[[10, 30]] + 0.5).all()


def test_the_choice_is_the_same_every_time_and_takes_no_more_than_there_are(public, odds) -> None:
    chosen = choose_proxies(_documents("law", count=20, seed=1), public, count=100)
    assert chosen == np.argsort(-odds, kind="stable").tolist()
    assert sorted(chosen) == list(range(40))


def test_too_little_text(public) -> None:
    with pytest.raises(DataError) as caught:
        choose_proxies(["a"], ["b"], count=1)
    assert str(caught.value) == "Proxies are chosen among public documents: give at least 2, not 1."
    with pytest.raises(DataError) as caught:
        DomainClassifier([], public)
    assert str(caught.value) == (
        "A domain's classifier needs documents of both sides: 0 of the owner and 40 public ones were given."
    )


class TestCommand:
    """coterie expert proxies."""

    @pytest.fixture
    def run(self, tmp_path, public):
        from typer.testing import CliRunner

        from pipelines.cli.app import app

        texts = {"own": _documents("law", count=20, seed=1), "public": public}
        for name, documents in texts.items():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
            (tmp_path / f"{name}.jsonl").write_text(lines)

        def call(*options: object, own: str = "own.jsonl"):
            words = ["expert", "proxies", "--data", tmp_path / own, "--public", tmp_path / "public.jsonl"]
            return CliRunner().invoke(app, [*map(str, [*words, *options])], prog_name="coterie")

        return call

    def test_writes_the_documents(self, run, tmp_path, public) -> None:
        out = tmp_path / "proxies.jsonl"
        result = run("--count", 2, "--out", out)
        assert (result.exit_code, result.stderr) == (0, "")
        assert result.stdout == f"Wrote 2 of 40 public documents to {out}.\n"
        assert sorted(json.loads(line)["text"] for line in out.read_text().splitlines()) == sorted(
            [public[10], public[30]]
        )

    def test_refusals(self, run, tmp_path) -> None:
        taken = tmp_path / "taken.jsonl"
        taken.write_text("")
        result = run("--out", taken)
        assert (result.exit_code, result.stderr) == (
            2,
            f"Error: '{taken}' exists already. Choose another file, or remove it.\n",
        )
        result = run("--out", tmp_path / "x.jsonl", own="none.jsonl")
        assert result.exit_code == 2
        assert result.stderr == "Error: none.jsonl cannot be read: No such file or directory.\n"
        assert not (tmp_path / "x.jsonl").exists()
