"""attribute: its table, its JSON, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

PROMPT = ("--prompt", "The licensee", "--continuation", " shall pay.")


def test_json(run: Any, composed: Path) -> None:
    outcome = run("attribute", composed, *PROMPT, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    result = outcome.json
    assert list(result) == [
        "prompt",
        "continuation",
        "tokens",
        "log_likelihood",
        "log_likelihood_of_anchor",
        "anchor_mass",
        "owners",
    ]
    assert result["tokens"] == len(" shall pay.")  # a byte a token
    owners = result["owners"]
    assert list(owners) == ["acme", "hosp", "soft"]
    assert all(list(row) == ["mass", "leave_one_out", "shapley"] for row in owners.values())
    assert result["anchor_mass"] + sum(row["mass"] for row in owners.values()) == pytest.approx(1)
    gain = result["log_likelihood"] - result["log_likelihood_of_anchor"]
    assert sum(row["shapley"] for row in owners.values()) == pytest.approx(gain)
    without = run("attribute", composed, *PROMPT, "--opt-out", "acme", "--method", "mass", "--json").json
    assert without["owners"].keys() == {"hosp", "soft"}
    left = result["log_likelihood"] - owners["acme"]["leave_one_out"]
    assert without["log_likelihood"] == pytest.approx(left, abs=1e-4)


def test_table(run: Any, composed: Path) -> None:
    result = run("attribute", composed, *PROMPT, "--json").json
    outcome = run("attribute", composed, *PROMPT)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["OWNER", "MASS", "LEAVE-ONE-OUT", "SHAPLEY"]
    for line, (owner, row) in zip(lines[1:4], result["owners"].items(), strict=True):
        cells = [owner, f"{row['mass']:.1%}", f"{row['leave_one_out']:+.3f}", f"{row['shapley']:+.3f}"]
        assert line.split()[:4] == cells
        before, bar, after = line.partition("|")
        assert bar
        assert "█" not in (before if row["shapley"] > 0 else after)
    assert max(line.count("█") for line in lines) in range(8, 25)
    assert lines[4].split() == ["anchor", f"{result['anchor_mass']:.1%}", "-", "-"]
    gain = result["log_likelihood"] - result["log_likelihood_of_anchor"]
    assert lines[5:] == [
        f"log-likelihood of the continuation's 11 tokens: {result['log_likelihood']:.3f} nats, "
        f"{result['log_likelihood_of_anchor']:.3f} with the anchor alone ({gain:+.3f})"
    ]


def test_prompt_from_stdin_and_one_method(run: Any, composed: Path) -> None:
    outcome = run("attribute", composed, "--prompt", "-", "--method", "leave-one-out", stdin="def main():")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["OWNER", "LEAVE-ONE-OUT"]
    assert [line.split()[0] for line in lines[1:4]] == ["acme", "hosp", "soft"]
    assert lines[4].startswith("log-likelihood of the prompt's 10 tokens: ")


def test_bars() -> None:
    from pipelines.cli.attribute import _bars

    bars = _bars({"a": 2.0, "b": -1.0, "c": 0.0})
    assert bars == {"a": " " * 8 + "|" + "█" * 16, "b": "█" * 8 + "|", "c": " " * 8 + "|"}
    assert _bars({"a": 0.0}) == {"a": "|"}


def test_too_many_owners_get_no_shapley_values(capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.cli.attribute import _affordable

    assert _affordable(8) == ["mass", "leave-one-out", "shapley"]
    assert _affordable(9) == ["mass", "leave-one-out"]
    assert capsys.readouterr().err == (
        "Note: no Shapley values, which are exact for at most 8 owners; here are 9.\n"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--prompt", "abc", "--method", "shaply"],
            "Error: Unknown method 'shaply'. Did you mean 'shapley'? Known: leave-one-out, mass, shapley.\n",
        ),
        (
            ["--prompt", "abc", "--method", "mass", "--method", "mass"],
            "Error: --method names a method twice. Give each once.\n",
        ),
        (["--prompt", ""], "Error: The prompt has 0 tokens, and the first one is only given. Give a longer prompt, "
         "or a continuation.\n"),
        (
            ["--prompt", "abc", "--opt-out", "acm"],
            "Error: Unknown owner 'acm'. Did you mean 'acme'? Known: acme, hosp, soft.\n",
        ),
        (
            ["--prompt", "abc", "--opt-out", "acme", "--opt-out", "hosp", "--opt-out", "soft"],
            "Error: This model has no owners left, so there is nobody to attribute to.\n",
        ),
    ],
    ids=["unknown-method", "twice", "empty", "unknown-owner", "nobody"],
)  # fmt: skip
def test_refusals(run: Any, composed: Path, options: list[str], message: str) -> None:
    outcome = run("attribute", composed, *options)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", message)
