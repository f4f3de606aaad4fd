"""Texts of one's own in an experiment: how they are divided, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from experts.errors import CoterieError
from pipelines.experiments import Experiment
from pipelines.experiments.world import Texts, read_texts

CONTRACTS = [f"The licensee of contract {number} shall pay." for number in range(40)]
MINUTES = [f"Minute {number} of the meeting." for number in range(10)]

Read = Callable[..., Texts]


def write(path: Path, documents: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


@pytest.fixture
def read(
    tiny_settings: dict[str, Any], tiny_fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Read:
    """Read an experiment whose YAML lies in ``tmp_path``, with some of its lists changed."""
    monkeypatch.setattr("pipelines.assets.domain_text", tiny_fetch)

    def call(**changes: Any) -> Texts:
        path = tmp_path / "own.yaml"
        path.write_text(json.dumps({**tiny_settings, **changes}))
        return read_texts(Experiment.from_file(path))

    return call


def domains(**own: Any) -> list[Any]:
    return ["python", {"name": "contracts", **own}]


class TestDividing:
    def test_a_fifth_is_held_out_by_digests_alone(self, read: Read, tmp_path: Path) -> None:
        write(tmp_path / "law" / "a.jsonl", CONTRACTS[:20])
        write(tmp_path / "law" / "b.jsonl", CONTRACTS[20:])
        texts = read(domains=domains(text="law/*.jsonl"), public_share=0)
        owned, held_out = texts.owned["contracts"], texts.held_out["contracts"]
        assert sorted([*owned, *held_out]) == sorted(CONTRACTS)
        assert 4 <= len(held_out) <= 12
        write(tmp_path / "law" / "a.jsonl", [*CONTRACTS[:20], "And another one."])
        write(tmp_path / "law" / "b.jsonl", CONTRACTS[20:][::-1])
        more = read(domains=domains(text=["law/b.jsonl", "law/a.jsonl"]), public_share=0)
        assert set(owned) <= set(more.owned["contracts"])
        assert [text for text in more.owned["contracts"] if text in owned] == owned

    def test_a_share_of_it_is_public(self, read: Read, tmp_path: Path, tiny_texts: Texts) -> None:
        write(tmp_path / "law.jsonl", CONTRACTS)
        write(tmp_path / "test.jsonl", MINUTES)
        texts = read(domains=domains(text="law.jsonl", held_out="test.jsonl"), public_share=0.25)
        public = [text for text in texts.public if text in CONTRACTS]
        assert len(public) == 10
        assert sorted([*public, *texts.owned["contracts"]]) == sorted(CONTRACTS)
        assert sorted(texts.held_out["contracts"]) == MINUTES

    def test_public_text_and_nobodys_are_taken_whole(self, read: Read, tmp_path: Path) -> None:
        write(tmp_path / "law.jsonl", CONTRACTS)
        (tmp_path / "minutes.txt").write_text("".join(MINUTES))
        texts = read(
            public=[{"name": "contracts", "text": "law.jsonl"}],
            unowned=["stories", {"name": "minutes", "text": str(tmp_path / "minutes.txt")}],
            public_share=0,
        )
        assert sorted(texts.public) == sorted(CONTRACTS)
        assert list(texts.held_out) == ["python", "icd10", "stories", "minutes"]
        assert texts.held_out["minutes"] == ["".join(MINUTES)]


def test_settings_survive_their_plain_form(tiny_settings: dict[str, Any]) -> None:
    data = {**tiny_settings, "domains": domains(text="law.jsonl")}
    experiment = Experiment.from_dict(data)
    assert experiment.domains == ("python", "contracts")
    assert experiment.to_dict()["own_texts"] == [{"name": "contracts", "text": ["law.jsonl"], "held_out": []}]
    assert Experiment.from_dict(experiment.to_dict()) == experiment
    assert "own_texts" not in Experiment.from_dict(tiny_settings).to_dict()  # as older work folders have it


BESIDE = "Relative paths start beside the experiment's file."


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"text": "lew.jsonl"}, f"contracts: there is no file '{{here}}/lew.jsonl'. {BESIDE}"),
        ({"text": "law/*.jsonl"}, f"contracts: no file matches '{{here}}/law/*.jsonl'. {BESIDE}"),
        (
            {"text": "law.jsonl", "held_out": "no.txt"},
            f"contracts: there is no file '{{here}}/no.txt'. {BESIDE}",
        ),
        ({"text": "empty.jsonl"}, "contracts: No text in empty.jsonl."),
        (
            {"text": "fields.jsonl"},
            'contracts: fields.jsonl, line 1: no string under "text". Write {{"text": "..."}} on every line.',
        ),
        (
            {"text": "own.yaml"},
            "contracts: '{here}/own.yaml' is neither .jsonl nor .txt. Give a .jsonl file with {{\"text\": ...}} on "
            "every line, or a .txt file that is one document.",
        ),
        (
            {"text": "one.txt"},
            "contracts: 1 document in {here}/one.txt, none of which can be held out. Give at least two that differ, "
            "or other files with 'held_out'.",
        ),
        (
            {"text": "law.jsonl", "held_out": "some.jsonl"},
            "contracts: 2 of 3 documents that are to be measured are trained on as well (in contracts). Take them "
            "out of one of the two.",
        ),
    ],
)
def test_files_that_are_of_no_use(read: Read, tmp_path: Path, own: dict[str, Any], message: str) -> None:
    write(tmp_path / "law.jsonl", CONTRACTS)
    write(tmp_path / "some.jsonl", [*MINUTES[:1], f" {CONTRACTS[3]}\n", CONTRACTS[2].replace(" ", "\n")])
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "fields.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(CoterieError) as caught:
        read(domains=domains(**own))
    assert str(caught.value) == message.format(here=tmp_path)
    assert caught.value.exit_code == 2


def test_public_text_that_is_measured(read: Read, tmp_path: Path) -> None:
    write(tmp_path / "law.jsonl", CONTRACTS)
    write(tmp_path / "test.jsonl", MINUTES)
    with pytest.raises(CoterieError, match=r"^contracts: 10 of 10 documents .* as well \(in minutes\)\."):
        read(
            domains=domains(text="law.jsonl", held_out="test.jsonl"),
            public=["history", {"name": "minutes", "text": "test.jsonl"}],
        )


OWN = {"name": "contracts", "text": "law.jsonl"}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"domains": ["python", {"text": "law.jsonl"}]}, "domains[1] has 1 problem:\n  - name: missing"),
        ({"domains": ["python", {"name": "law"}]}, "domains[1] has 1 problem:\n  - text: missing"),
        ({"domains": ["python", {**OWN, "txt": ""}]}, "txt: unknown key; did you mean 'text'?"),
        (
            {"public": [{**OWN, "name": "history"}]},
            "name: 'history' is a text that the project can fetch; call your own another name",
        ),
        (
            {"public": [{**OWN, "name": "mean"}]},
            "'mean' means something else in results; call your text another name",
        ),
        ({"domains": ["python", OWN, OWN]}, "contracts: two texts of your own have this name"),
        ({"domains": ["python", OWN], "public": [OWN]}, "contracts: two texts of your own have this name"),
        (
            {"domains": ["python", OWN], "public": ["contracts"]},
            "a domain cannot be public or nobody's as well",
        ),
        ({"domains": ["python", "python"]}, "python: named twice in 'domains'"),
        ({"own_texts": [OWN]}, "contracts: no list names this text"),
        (
            {"own_texts": [OWN], "public": ["contracts"], "unowned": ["contracts"]},
            "contracts: a text of your own can be public or nobody's, not both",
        ),
        (
            {"public": [{**OWN, "held_out": "test.jsonl"}]},
            "contracts: 'held_out' is for domains; public text is trained on, and nobody's measured, as a whole",
        ),
        ({"domains": ["python", "contracts"]}, "For a text of your own write {name: NAME, text: FILE}."),
    ],
)
def test_mistakes_are_named(tiny_settings: dict[str, Any], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(CoterieError) as caught:
        Experiment.from_dict({**tiny_settings, **change})
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2
