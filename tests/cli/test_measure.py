"""evaluate: its table, its JSON, and its refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

SMALL = ("--sequence-length", "16", "--max-tokens", "64")


def test_json_is_the_models_own_loss(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    """The oracle: the same windows through transformers' own loss."""
    import torch

    import composer
    from pipelines.train.windows import make_windows, read_documents

    outcome = run("evaluate", composed, "--data", f"law={texts['law']}", *SMALL, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert list(outcome.json) == ["opt_out", "mean_nll", "domains", "mean_routing_accuracy", "dtype"]
    assert outcome.json["dtype"] == "float32"
    score = outcome.json["domains"]["law"]
    assert list(score) == [
        "nll",
        "bits_per_byte",
        "tokens",
        "seconds",
        "routing",
        "sent",
        "load",
        "router_entropy",
        "tokens_per_second",
        "owners",
        "routing_accuracy",
    ]
    assert score["owners"] == ["acme"]
    assert score["routing_accuracy"] == score["sent"]["acme"] == outcome.json["mean_routing_accuracy"]
    assert set(score["load"]) == {"anchor", "acme/contracts", "hosp/icd", "soft/python"}

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(composed)
    documents = read_documents([texts["law"]])
    windows = make_windows(documents, tokenizer, sequence_length=16, limit=4, seed=0).ids
    ids = torch.from_numpy(windows).long()
    with torch.inference_mode():
        expected = float(composer.load(composed)(ids, labels=ids).loss)
    assert score["tokens"] == len(ids) * 15
    assert score["nll"] == pytest.approx(expected, rel=1e-5)
    assert outcome.json["mean_nll"] == score["nll"]
    assert sum(score["routing"].values()) == pytest.approx(1)
    assert set(score["routing"]) == {"anchor", "acme", "hosp", "soft"}


def test_table(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    data = ("--data", f"law={texts['law']}", "--data", f"code={texts['code']}")
    outcome = run("evaluate", composed, *data, *SMALL)
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == (
        "DOMAIN    NLL  BITS/BYTE  TOKENS  TOKENS/S  ACCURACY  ENTROPY  TO ANCHOR  TO ACME  TO HOSP  TO SOFT"
    )
    assert [line.split()[0] for line in lines[1:3]] == ["law", "code"]
    assert lines[3].startswith("mean NLL ")
    assert "nats per token, mean routing accuracy " in lines[3]
    assert (lines[4], lines[5]) == ("", "TOKENS THAT USE  LAW  CODE")
    assert [line.split()[0] for line in lines[6:]] == ["anchor", "acme/contracts", "hosp/icd", "soft/python"]
    rows = run("evaluate", composed, *data, *SMALL, "--json").json
    assert f"  {rows['domains']['law']['nll']:.3f}  " in lines[1]


def test_an_owner_left_out_gets_nothing(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    args = ("evaluate", composed, "--data", f"law={texts['law']}", *SMALL, "--json")
    rows = run(*args, "--opt-out", "acme").json
    assert rows["opt_out"] == ["acme"]
    assert set(rows["domains"]["law"]["routing"]) == {"anchor", "hosp", "soft"}


def test_leave_one_out(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    args = ("evaluate", composed, "--data", f"law={texts['law']}", *SMALL)
    arms = run(*args, "--leave-one-out", "--json").json
    assert list(arms) == [
        "composed",
        "composed-without:acme",
        "composed-without:hosp",
        "composed-without:soft",
    ]
    assert arms["composed-without:acme"]["opt_out"] == ["acme"]
    alone = run(*args, "--opt-out", "acme", "--json").json
    assert arms["composed-without:acme"]["mean_nll"] == pytest.approx(alone["mean_nll"], abs=1e-5)
    whole = arms.pop("composed")
    assert "mean_nll_change" not in whole
    for arm in arms.values():
        assert arm["mean_nll_change"] == pytest.approx(arm["mean_nll"] - whole["mean_nll"])
        law, before = arm["domains"]["law"], whole["domains"]["law"]
        assert law["nll_change"] == pytest.approx(law["nll"] - before["nll"])
    assert arms["composed-without:acme"]["mean_routing_accuracy"] is None
    assert arms["composed-without:soft"]["mean_routing_accuracy"] is not None

    table, changes = (part.splitlines() for part in run(*args, "--leave-one-out").out.split("\n\n"))
    assert table[0].split() == ["NLL", "LAW", "MEAN"]
    assert [line.split()[0] for line in table[1:]] == ["composed", *arms]
    assert changes[0].split() == ["CHANGE", "OF", "THE", "NLL", "LAW", "MEAN"]
    assert [line.split() for line in changes[1:]] == [
        [name, f"{arm['domains']['law']['nll_change']:+.3f}", f"{arm['mean_nll_change']:+.3f}"]
        for name, arm in arms.items()
    ]


def test_whose_a_domain_is_can_be_said(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    data = ("--data", f"wills={texts['law']}", "--data", f"news={texts['public']}")
    args = ("evaluate", composed, *data, *SMALL, "--json")
    rows = run(*args).json
    assert [score["routing_accuracy"] for score in rows["domains"].values()] == [None, None]
    assert rows["mean_routing_accuracy"] is None
    given = ("wills=acme", "wills=hosp", "news=anchor")
    rows = run(*args, *(part for pair in given for part in ("--domain-owner", pair))).json
    wills, news = rows["domains"]["wills"], rows["domains"]["news"]
    assert (wills["owners"], news["owners"]) == (["acme", "hosp"], ["anchor"])
    assert wills["routing_accuracy"] == pytest.approx(wills["sent"]["acme"] + wills["sent"]["hosp"])
    assert news["routing_accuracy"] == news["sent"]["anchor"]
    mean = (wills["routing_accuracy"] + news["routing_accuracy"]) / 2
    assert rows["mean_routing_accuracy"] == pytest.approx(mean)


def test_heatmap(run: Any, composed: Path, texts: dict[str, Path], tmp_path: Path) -> None:
    picture = tmp_path / "who.png"
    outcome = run("evaluate", composed, "--data", f"law={texts['law']}", *SMALL, "--heatmap", picture)
    assert (outcome.code, outcome.err) == (0, "")
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert list(tmp_path.iterdir()) == [picture]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--domain-owner", "law"],
            "Error: --domain-owner 'law' is not of the form DOMAIN=OWNER, for instance law=acme.\n",
        ),
        (
            ["--domain-owner", "lw=acme"],
            "Error: Unknown domain 'lw'. Did you mean 'law'? Known: law.\n",
        ),
        (
            ["--domain-owner", "law=acm"],
            "Error: Unknown owner 'acm'. Did you mean 'acme'? Known: acme, anchor, hosp, soft.\n",
        ),
        (["--heatmap", "who.pdf"], "Error: --heatmap who.pdf is not a .png file in a folder that exists.\n"),
        (
            ["--heatmap", "nowhere/who.png"],
            "Error: --heatmap nowhere/who.png is not a .png file in a folder that exists.\n",
        ),
    ],
)
def test_bad_options(
    run: Any, composed: Path, texts: dict[str, Path], options: list[str], message: str
) -> None:
    outcome = run("evaluate", composed, "--data", f"law={texts['law']}", *options)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["law"], "Error: --data 'law' is not of the form DOMAIN=FILE, for instance law=law.jsonl.\n"),
        (
            ["=x.jsonl"],
            "Error: --data '=x.jsonl' is not of the form DOMAIN=FILE, for instance law=law.jsonl.\n",
        ),
        (
            ["law=a.jsonl", "law=b.jsonl"],
            "Error: --data names the domain 'law' twice. Put its text into one file.\n",
        ),
        (["law=none.jsonl"], "Error: none.jsonl cannot be read: No such file or directory.\n"),
    ],
)
def test_bad_data(run: Any, composed: Path, data: list[str], message: str) -> None:
    outcome = run("evaluate", composed, *(part for given in data for part in ("--data", given)))
    assert (outcome.code, outcome.out, outcome.err) == (2, "", message)


def test_contradiction(run: Any, composed: Path, texts: dict[str, Path]) -> None:
    outcome = run(
        "evaluate", composed, "--data", f"law={texts['law']}", "--leave-one-out", "--opt-out", "acme"
    )
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == "Error: --leave-one-out leaves each owner out in turn: give it without --opt-out.\n"


def test_nan_becomes_null(
    run: Any, composed: Path, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import pipelines.evaluate as module

    score = module.DomainScore(nll=1.0, bits_per_byte=math.nan, tokens=1, seconds=0.0, routing={})
    fixed = module.Evaluation(opt_out=(), domains={"law": score})
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: fixed)
    rows = run("evaluate", composed, "--data", f"law={texts['law']}", "--json").json
    assert rows["domains"]["law"]["bits_per_byte"] is None
    assert rows["domains"]["law"]["tokens_per_second"] is None
