"""compare: a composed folder beside its baselines, who is left out of them, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

SMALL = ("--sequence-length", "16", "--max-tokens", "64")


def test_arms_are_those_of_the_library(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    from pipelines.baselines import BASELINES, BaselineContext, make_baseline, score
    from pipelines.evaluate import prepare, read_domains

    data = ("--data", f"law={texts['law']}", "--data", f"medicine={texts['medicine']}")
    outcome = run("compare", composed, *data, "--public", texts["public"], *SMALL, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    singles = ["expert:code", "expert:law", "expert:medicine"]
    assert set(outcome.json) == {"composed", *singles, *set(BASELINES) - {"single"}}
    evaluated = run("evaluate", composed, *data, *SMALL, "--json").json
    assert outcome.json["composed"]["mean_nll"] == evaluated["mean_nll"]

    documents = read_domains({domain: texts[domain] for domain in ("law", "medicine")})
    tokenizer = AutoTokenizer.from_pretrained(composed)
    windows = prepare(documents, tokenizer, sequence_length=16, max_tokens=64)
    context = BaselineContext.from_composed(composed)
    for name in ("soup", "btm", "oracle", "prompt_router"):
        expected = score(make_baseline(name, context), windows)
        assert outcome.json[name]["mean_nll"] == expected.mean_nll, name
    for domain in ("law", "medicine"):
        own = outcome.json[f"expert:{domain}"]["domains"][domain]["nll"]
        assert outcome.json["oracle"]["domains"][domain]["nll"] == own


def test_options_are_those_of_the_library(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    from pipelines.baselines import BaselineContext, make_baseline, score
    from pipelines.evaluate import prepare, read_domains

    args = ("compare", composed, "--data", f"law={texts['law']}", *SMALL, "--json")
    chosen = ("--baseline", "btm", "--baseline", "prompt_router")
    given = ("--btm-top-k", "1", "--btm-temperature", "0.5", "--prompt-tokens", "4")
    outcome = run(*args, *chosen, *given)
    assert (outcome.code, outcome.err) == (0, "")
    plain = run(*args, *chosen).json
    windows = prepare(
        read_domains({"law": texts["law"]}),
        AutoTokenizer.from_pretrained(composed),
        sequence_length=16,
        max_tokens=64,
    )
    context = BaselineContext.from_composed(composed)
    options: dict[str, dict[str, Any]] = {
        "btm": {"top_k": 1, "temperature": 0.5},
        "prompt_router": {"prompt_tokens": 4},
    }
    for name, expected in options.items():
        assert outcome.json[name]["options"] == expected
        assert (
            outcome.json[name]["mean_nll"]
            == score(make_baseline(name, context, **expected), windows).mean_nll
        )
        assert outcome.json[name]["mean_nll"] != plain[name]["mean_nll"]
    assert plain["btm"]["options"] == {"top_k": None, "temperature": 1.0}
    assert plain["prompt_router"]["options"] == {"prompt_tokens": 32}


def test_the_defaults_shown_are_those_of_the_baselines() -> None:
    import inspect

    from pipelines.baselines import BASELINES
    from pipelines.cli.compare import _DEFAULTS

    for name, shown in _DEFAULTS.items():
        parameters = inspect.signature(BASELINES.load(name)).parameters
        assert shown == {option: parameters[option].default for option in shown}


def test_names_and_numbers_that_do_less_than_they_seem_to(
    run: Any, composed: Path, texts: dict[str, Path]
) -> None:
    args = ("compare", composed, "--data", f"lew={texts['law']}", "--btm-top-k", "9", *SMALL)
    outcome = run(*args, "--baseline", "oracle", "--baseline", "btm")
    assert outcome.code == 0
    assert outcome.err == (
        "Note: --btm-top-k 9: there are only 3 experts, and btm mixes all of them.\n"
        "Note: no expert here has the domain lew (known: code, law, medicine), so the oracle takes the base for its "
        "text.\n"
    )


def test_table_without_an_owner(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    args = (
        "compare",
        composed,
        "--data",
        f"law={texts['law']}",
        "--baseline",
        "single",
        "--baseline",
        "soup",
    )
    outcome = run(*args, *SMALL, "--opt-out", "acme")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [line.split() for line in outcome.out.splitlines()]
    assert lines[0] == ["NLL", "LAW", "MEAN"]
    assert [line[0] for line in lines[1:]] == ["composed", "expert:code", "expert:medicine", "soup"]
    assert all(line[1] == line[2] for line in lines[1:])


def test_who_has_opted_out_since_the_build_is_in_no_baseline(
    run: Any, composed: Path, registry: Path, texts: dict[str, Path]
) -> None:
    run("opt-out", "add", "soft", "--reason", "moved", registry=registry)
    args = ("compare", composed, "--data", f"law={texts['law']}", "--baseline", "single", *SMALL, "--json")
    outcome = run(*args, registry=registry)
    assert outcome.err == "Note: soft has opted out since the build and is left out.\n"
    assert set(outcome.json) == {"composed", "expert:law", "expert:medicine"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ("--baseline", "soop"),
            "Error: Unknown baseline 'soop'. Did you mean 'soup'? Known: anchor, btm, dare_ties, oracle, "
            "prompt_router, single, soup, ties, weighted_soup.",
        ),
        (
            ("--baseline", "weighted_soup"),
            "Error: --baseline weighted_soup takes its weights from public text: give it with --public.",
        ),
        (
            ("--data", "law"),
            "Error: --data 'law' is not of the form DOMAIN=FILE, for instance law=law.jsonl.",
        ),
        (("--btm-temperature", "0"), "Error: --btm-temperature 0: it must be a number above 0."),
        (("--btm-temperature", "nan"), "Error: --btm-temperature nan: it must be a number above 0."),
        (
            ("--prompt-tokens", "128"),
            "Error: --prompt-tokens 128 covers windows of 128 tokens whole, so the base alone would predict them. "
            "Lower it, or raise --sequence-length.",
        ),
        (
            ("--btm-top-k", "2", "--baseline", "soup"),
            "Error: --btm-top-k is for the baseline btm, which is not measured. Add --baseline btm.",
        ),
        (("--data", "law=b.txt"), "Error: --data names the domain 'law' twice. Put its text into one file."),
    ],
)
def test_refusals(run: Any, composed: Path, texts: dict[str, Path], args: Any, message: str) -> None:
    outcome = run("compare", composed, "--data", f"law={texts['law']}", *args)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"{message}\n")
