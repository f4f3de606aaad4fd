"""The whole check, on a model in which one owner is known to have memorised a canary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from experts.errors import DataError, OptOutError, UnknownNameError
from pipelines.memorization import extraction
from pipelines.memorization.canaries import Canary
from pipelines.memorization.check import (
    Checks,
    arms_of,
    canary_cases,
    check,
    sequence_losses,
    text_cases,
)
from pipelines.memorization.extraction import Case, continuations


@pytest.fixture(scope="module")
def model(leaky: Path) -> Any:
    from composer.loading import load

    return load(leaky)


@pytest.fixture(scope="module")
def reports(model: Any, tokenizer: Any, canary: Canary) -> Any:
    ids = tokenizer(canary.text).input_ids
    never = torch.randint(1, 33, (14,), generator=torch.Generator().manual_seed(5))
    texts = [Case(prefix=tuple(row[:8]), target=tuple(row[8:])) for row in (ids, never.tolist())]
    checks = Checks(canaries=[canary], texts=texts, references=255)
    seen: list[tuple[int, int]] = []
    result = check(
        model, tokenizer, checks, arms=arms_of(model.owners), progress=lambda *done: seen.append(done)
    )
    assert seen == [(i, 8) for i in range(1, 9)]
    return result


def test_a_planted_canary_is_found(reports: Any) -> None:
    """The positive control."""
    (score,) = reports["composed"].canaries
    assert score.exposure == score.ceiling == 8.0
    assert score.estimated > 12
    assert score.similarity == 1.0
    assert score.extracted
    assert reports["composed"].similarities[0] == 1.0
    assert reports["composed"].extracted == 1


def test_leaving_takes_it_along(reports: Any, leaky: Path, tokenizer: Any, canary: Canary) -> None:
    """Without the owner, exposure is at chance and that of the model the owner's files were never opened for."""
    from composer.loading import load

    assert list(reports) == ["composed", "composed-without:bob", "composed-without:spy", "anchor"]
    assert reports["composed-without:bob"].canaries[0].exposure == 8.0
    for arm in ("composed-without:spy", "anchor"):
        (score,) = reports[arm].canaries
        assert score.exposure < 4
        assert score.estimated == pytest.approx(score.exposure, abs=1.5)
        assert not score.extracted
        assert reports[arm].extracted == 0
    loaded = load(leaky, opt_out={"spy"})
    (apart,) = check(loaded, tokenizer, Checks(canaries=[canary]), arms={"composed": ()}).values()
    (score,) = reports["composed-without:spy"].canaries
    assert apart.canaries[0].exposure == score.exposure
    assert apart.canaries[0].estimated == pytest.approx(score.estimated, abs=1e-3)


def test_unknown_text_is_not_extracted(reports: Any) -> None:
    """The negative control: a random text beside the planted one."""
    assert reports["composed"].similarities[1] < 0.9


def test_losses_are_those_of_single_rows(model: Any, pico: Any) -> None:
    """Padding and order change nothing: the oracle is transformers' own loss, row by row."""
    rows = [pico.prompts(rows=1, length=length, seed=length)[0].tolist() for length in (9, 3, 17, 2, 12)]
    expected = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row])
            expected.append(float(model(ids, labels=ids, opt_out={"bob"}).loss) * (len(row) - 1))
    for batch_size in (1, 2, 16):
        losses = sequence_losses(model, rows, opt_out={"bob"}, batch_size=batch_size)
        assert losses == pytest.approx(expected, rel=1e-5)


def test_samples_find_what_greed_finds(
    model: Any, tokenizer: Any, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = canary_cases([canary], tokenizer)
    assert cases == [
        Case(prefix=tuple(tokenizer("#%&*#?>$").input_ids), target=tuple(tokenizer("281265").input_ids))
    ]
    # the pico base's logits differ by less than 1: at temperature 1 every token is about as likely as any other
    monkeypatch.setitem(extraction._SAMPLING, "temperature", 0.01)
    drawn = [continuations(model, cases, samples=5, seed=1, batch_size=3)[0] for _ in range(2)]
    assert drawn == [1.0, 1.0]
    assert continuations(model, cases, samples=5, seed=1, opt_out={"spy"})[0] < 0.9


def test_draws_leave_the_random_state_alone(model: Any, tokenizer: Any, canary: Canary) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    continuations(model, canary_cases([canary], tokenizer), samples=2)
    assert torch.equal(torch.rand(2), expected)


def test_where_a_canary_is_cut(tokenizer: Any) -> None:
    whole = Canary(text="abcdefgh", secret="abcdefgh")
    middle = Canary(text="ab12cd", secret="12")
    cases = canary_cases([whole, middle], tokenizer)
    assert [(len(case.prefix), len(case.target)) for case in cases] == [(4, 4), (2, 2)]
    with pytest.raises(DataError) as caught:
        canary_cases([middle, Canary(text="7", secret="7")], tokenizer)
    assert str(caught.value) == "Canary 2 is a single token, of which nothing can be asked."


def test_beginnings_of_documents(tokenizer: Any) -> None:
    documents = ["abcdefghij", "short", *(f"{i}bcdefghij" for i in range(8))]
    cases = text_cases(documents, tokenizer, prefix=4, new=3, limit=3)
    assert [tokenizer.decode(case.prefix + case.target) for case in cases] == [
        "abcdefg",
        "2bcdefg",
        "5bcdefg",
    ]
    assert {len(case.prefix) for case in cases} == {4}
    with pytest.raises(DataError) as caught:
        text_cases(["abc", "de"], tokenizer, prefix=4, new=3, limit=3)
    assert str(caught.value) == (
        "No document has 7 tokens (4 to be given and 3 to be asked for); the longest has 3. Give longer ones, or "
        "smaller numbers."
    )


def test_arms() -> None:
    assert arms_of(("a", "b"), without=("b",)) == {
        "composed": (),
        "composed-without:b": ("b",),
        "anchor": ("a", "b"),
    }
    with pytest.raises(UnknownNameError) as caught:
        arms_of(("acme", "bob"), without=("acm",))
    assert str(caught.value) == "Unknown owner 'acm'. Did you mean 'acme'? Known: acme, bob."


def test_nothing_to_look_for(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        check(model, tokenizer, Checks(), arms=arms_of(model.owners))
    assert str(caught.value) == "There is nothing to look for. Give canaries, training text, or both."


def _coterie(*args: object) -> Any:
    from pipelines.cli.app import app

    return CliRunner().invoke(app, list(map(str, args)), prog_name="coterie")


@pytest.fixture
def files(tmp_path: Path, canary: Canary) -> dict[str, Path]:
    paths = {"canaries": tmp_path / "canaries.jsonl", "text": tmp_path / "text.jsonl"}
    paths["canaries"].write_text(json.dumps({"text": canary.text, "secret": canary.secret}) + "\n")
    paths["text"].write_text(json.dumps({"text": canary.text}) + "\n")
    return paths


def test_command(leaky: Path, files: dict[str, Path]) -> None:
    args = ("memorization", leaky, "--canaries", files["canaries"], "--references", "63", "--owner", "spy")
    text = ("--text", files["text"], "--prefix-tokens", "8", "--new-tokens", "6")
    outcome = _coterie(*args, *text, "--json")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    rows = json.loads(outcome.stdout)
    assert list(rows) == ["composed", "composed-without:spy", "anchor"]
    whole, without = rows["composed"], rows["composed-without:spy"]
    assert whole["mean_exposure"] == whole["canaries"][0]["ceiling"] == 6.0
    assert whole["canaries"][0]["extracted"]
    assert whole["extraction"] == {
        "texts": 1,
        "extracted": 1,
        "rate": 1.0,
        "interval": [pytest.approx(0.025), 1.0],
        "similarities": [1.0],
    }
    assert without["opt_out"] == ["spy"]
    assert without["extraction"]["extracted"] == 0

    outcome = _coterie(*args, *text)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["CANARY", "CEILING", "COMPOSED", "WITHOUT", "SPY", "ANCHOR"]
    assert lines[1].split()[:3] == ["1", "6.0", "6.0*"]
    assert lines[2].split()[:3] == ["mean", "-", "6.0"]
    assert lines[3:5] == [
        "exposure in bits, 1.4 on average by chance; * the greedy continuation is the secret",
        "",
    ]
    assert lines[5].split() == ["MODEL", "EXTRACTED", "TEXTS", "RATE", "95%", "INTERVAL", "NEAREST"]
    assert lines[6].split() == ["composed", "1", "1", "100.0%", "2.5%", "to", "100.0%", "1.00"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Error: There is nothing to look for. Give --canaries, --text, or both.\n"),
        (
            ["--text", "t.jsonl", "--references", "9"],
            "Error: --references has no effect without --canaries.\n",
        ),
        (["--canaries", "c.jsonl", "--samples", "9"], "Error: --samples has no effect without --text.\n"),
        (["--canaries", "c.jsonl"], "Error: c.jsonl cannot be read: No such file or directory.\n"),
    ],
)
def test_refusals(leaky: Path, options: list[str], message: str) -> None:
    outcome = _coterie("memorization", leaky, *options)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (2, "", message)


def test_chance_is_said_right() -> None:
    """The mean of ``log2 n - log2 rank`` over all ranks tends to 1 / ln 2."""
    n = 100_000
    mean = math.log2(n) - math.fsum(math.log2(rank) for rank in range(1, n + 1)) / n
    assert mean == pytest.approx(1.44, abs=0.01)


def test_an_iterator_leaves_nobody_out_twice(model: Any, tokenizer: Any, canary: Canary) -> None:
    given = map(str.strip, ["acme"])
    for call in (
        lambda: sequence_losses(model, [[1, 2]], opt_out=given),
        lambda: continuations(model, [], opt_out=given),
        lambda: check(model, tokenizer, Checks(canaries=[canary]), arms={"without": given}),  # type: ignore[dict-item]
    ):
        with pytest.raises(OptOutError, match=r"^opt_out is or holds a 'map', which is no collection"):
            call()
