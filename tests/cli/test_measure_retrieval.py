"""``coterie evaluate``, ``index`` and ``search`` on a composed retriever: measured, routed, owners left out."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.retrieval import read_collection
from pipelines.retrieval.encoders import Encoder, open_encoder
from pipelines.retrieval.evaluation import evaluate, leave_one_out
from pipelines.retrieval.metrics import measure

OWNERS = ("acme", "bob", "zoe")


@pytest.fixture(scope="module")
def composed(pico: Any) -> Path:
    from composer import Manifest, build, plan

    registry = pico.retriever_library()
    manifest = Manifest.from_dict(
        {
            "name": "trio",
            "recipe": "router_retriever",
            "base": "embedder",
            "experts": [f"{owner}/search" for owner in OWNERS],
        }
    )
    return pico.once(
        lambda: build(plan(manifest, registry), pico.scratch("trio"), registry=registry),
        "integrations retriever",
    )


@pytest.fixture(scope="module")
def encoder(composed: Path) -> Encoder:
    return open_encoder(composed)


@pytest.fixture(scope="module")
def collections(pico: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A collection for each of two owners, whose documents are theirs."""
    root = tmp_path_factory.mktemp("collections")
    draw = random.Random(1)
    for seed, owner in enumerate(OWNERS[:2], start=1):
        texts = pico.domain_texts(seed, count=20)
        folder = root / owner
        folder.mkdir()
        corpus = [{"_id": f"{owner}-{n}", "text": text, "owner": owner} for n, text in enumerate(texts)]
        queries = [{"_id": f"q{n}", "text": " ".join(draw.sample(texts[n].split(), 3))} for n in range(8)]
        for name, rows in (("corpus", corpus), ("queries", queries)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "qrels.tsv").write_text("".join(f"q{n}\t{owner}-{n}\t1\n" for n in range(8)))
    return root


def test_values_are_those_of_a_search_by_hand(encoder: Encoder, collections: Path) -> None:
    tests = [read_collection(collections / owner) for owner in OWNERS[:2]]
    found = evaluate(encoder, tests)
    for test in tests:
        documents = encoder.model.encode_document([document.text for document in test.documents])
        for opt_out, values in ((None, found[test.name].metrics), (list(OWNERS), found[test.name].base)):
            queries = encoder.model.encode_query(list(test.queries.values()), opt_out=opt_out)
            scores = queries @ documents.T
            run = {
                query: {document.id: float(s) for document, s in zip(test.documents, row, strict=True)}
                for query, row in zip(test.queries, scores, strict=True)
            }
            expected = measure(run, test.judgements)
            assert values == {m: pytest.approx(np.mean(list(v.values()))) for m, v in expected.items()}
        score = found[test.name]
        assert score.against_base.difference == pytest.approx(
            score.metrics["ndcg@10"] - score.base["ndcg@10"]
        )
        assert sum(score.routing.values()) == pytest.approx(1.0)
        assert (score.queries, score.cut) == (8, 0)


def test_leaving_everybody_out_is_the_base(encoder: Encoder, collections: Path) -> None:
    test = read_collection(collections / "acme")
    tests = [replace(test, documents=[replace(document, owner=None) for document in test.documents])]
    score = evaluate(encoder, tests, opt_out=OWNERS)["acme"]
    assert score.metrics == score.base
    assert score.against_base.p_value == 1.0
    assert score.routing == {"base": 1.0, "acme": 0.0, "bob": 0.0, "zoe": 0.0}
    arms = leave_one_out(encoder, tests)
    assert list(arms) == ["composed", "without acme", "without bob", "without zoe"]
    assert arms["without acme"]["acme"].routing["acme"] == 0.0
    assert arms["without bob"] == {"acme": evaluate(encoder, tests, opt_out={"bob"})["acme"]}


def test_evaluate_prints_and_draws(
    run: Callable[..., Any], composed: Path, collections: Path, tmp_path: Path
) -> None:
    data = [part for owner in OWNERS[:2] for part in ("--data", f"{owner}={collections / owner}")]
    outcome = run("evaluate", composed, *data, "--heatmap", tmp_path / "who.png", "--opt-out", "zoe")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    headings = (
        "COLLECTION QUERIES NDCG@10 RECALL@10 RECALL@100 MRR@10 BASE CHANGE 95 % P TO BASE TO ACME TO BOB"
    )
    assert " ".join(lines[0].split()) == headings
    assert [line.split()[0] for line in lines[1:]] == ["acme", "bob"]
    assert (tmp_path / "who.png").read_bytes().startswith(b"\x89PNG")
    found = run("evaluate", composed, *data, "--leave-one-out", "--json").json
    assert set(found) == {"composed", *(f"without {owner}" for owner in OWNERS)}
    assert found["without acme"]["collections"]["acme"]["queries"] == 8
    assert 0 < found["composed"]["collections"]["bob"]["against_base"]["p_value"] <= 1


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


@pytest.fixture
def shared(collections: Path, tmp_path: Path) -> Path:
    """A collection of documents of acme and bob; two queries are answered by both, six by one of them alone."""
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("corpus", "queries"):
        rows = [json.loads(line) for o in OWNERS[:2] for line in _lines(collections / o / f"{name}.jsonl")]
        if name == "queries":
            rows = [{**row, "_id": f"q{n}"} for n, row in enumerate(rows[:8])]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = [(f"q{n}", f"{'acme' if n % 2 else 'bob'}-{n}") for n in range(8)]
    judged += [("q1", "bob-1"), ("q2", "acme-2"), ("q3", "zero")]
    corpus = folder / "corpus.jsonl"
    corpus.write_text(corpus.read_text() + json.dumps({"_id": "zero", "text": "duba", "owner": "yan"}) + "\n")
    (folder / "qrels.tsv").write_text("".join(f"{q}\t{d}\t{int(d != 'zero')}\n" for q, d in judged))
    return folder


def _written_without(folder: Path, owner: str, out: Path) -> Path:
    """The same files without an owner's lines, and without the queries that only they answer."""
    out.mkdir()
    rows = [json.loads(line) for line in _lines(folder / "corpus.jsonl")]
    kept = {row["_id"]: row for row in rows if row["owner"] != owner}
    (out / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept.values()))
    shutil.copy(folder / "queries.jsonl", out)
    judged = [line.split("\t") for line in _lines(folder / "qrels.tsv")]
    answered = {query for query, document, grade in judged if document in kept and grade == "1"}
    lines = ["\t".join(row) + "\n" for row in judged if row[1] in kept and row[0] in answered]
    (out / "qrels.tsv").write_text("".join(lines))
    return out


@pytest.mark.parametrize(("owner", "queries", "documents"), [("acme", 5, 20), ("bob", 5, 20), ("yan", 8, 1)])
def test_whoever_is_left_out_is_not_found_either(
    run: Callable[..., Any],
    composed: Path,
    encoder: Encoder,
    shared: Path,
    tmp_path: Path,
    owner: str,
    queries: int,
    documents: int,
) -> None:
    """As if neither the owner's expert nor the owner's documents had ever been there; yan has documents alone."""
    without = _written_without(shared, owner, tmp_path / "without")
    left = encoder.known if owner != "yan" else ()
    expected = evaluate(
        open_encoder(composed, opt_out={owner}.intersection(left)), [read_collection(without, name="c")]
    )
    assert expected["c"].queries == queries
    outcome = run("evaluate", composed, "--data", f"c={shared}", "--opt-out", owner, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json == json.loads(
        json.dumps({"opt_out": [owner], "collections": {"c": asdict(expected["c"])}})
    )
    assert outcome.err.splitlines()[-1] == (
        f"Note: {documents} of 41 documents of c are left out with their owners, and {8 - queries} of 8 queries, which "
        "only they answer."
    )
    asked = evaluate(encoder, [read_collection(shared, name="c")], opt_out={owner})["c"]
    assert (asked.metrics, asked.base) == (expected["c"].metrics, expected["c"].base)
    whole = evaluate(encoder, [read_collection(shared, name="c")])["c"]
    assert (whole.base == asked.base) == (owner == "yan"), "the control: there is a difference"
    arms = leave_one_out(encoder, [read_collection(shared, name="c")])
    assert {arm["c"].queries for arm in arms.values()} == {8}, "documents stay where experts are compared"


def test_a_ledger_leaves_documents_out_too(
    run: Callable[..., Any], composed: Path, shared: Path, pico: Any, tmp_path: Path
) -> None:
    from registry import Registry

    registry = Registry(shutil.copytree(pico.retriever_library().path, tmp_path / "registry"))
    asked = run("evaluate", composed, "--data", f"c={shared}", "--opt-out", "acme", "--json").json
    registry.opt_out("acme", reason="left")
    for more in ((), ("--opt-out", "acme")):
        found = run("evaluate", composed, "--data", f"c={shared}", *more, "--json", registry=registry.path)
        assert found.json == asked


def test_nothing_left_to_measure_is_said(run: Callable[..., Any], composed: Path, collections: Path) -> None:
    outcome = run("evaluate", composed, "--data", f"c={collections / 'acme'}", "--opt-out", "acme")
    assert (outcome.code, outcome.err) == (
        2,
        "Error: Every query of the collection 'c' is answered by documents of acme alone, so nothing is left to "
        "measure without them. Leave the collection out.\n",
    )


def test_search_says_who_answered(
    run: Callable[..., Any], composed: Path, collections: Path, tmp_path: Path
) -> None:
    corpus = [part for owner in OWNERS[:2] for part in ("--corpus", collections / owner / "corpus.jsonl")]
    index = tmp_path / "index"
    assert run("index", index, "--model", composed, *corpus, "--json").json["documents"] == 40
    query = json.loads((collections / "acme" / "queries.jsonl").read_text().splitlines()[0])["text"]
    found = run("search", index, composed, query, "--top-k", 3, "--json").json
    assert found["owner"] in OWNERS
    assert sum(found["weights"].values()) == pytest.approx(1.0)
    left = run("search", index, composed, query, "--opt-out", found["owner"], "--json").json
    assert found["owner"] not in left["weights"]
    assert all(document["owner"] != found["owner"] for document in left["documents"])
    only_documents = run("search", index, composed / "base", query, "--json").json
    assert only_documents["weights"] == {"base": 1.0}  # the base's own folder has the index's digest
    everybody = [part for owner in OWNERS for part in ("--opt-out", owner)]
    nothing = run("search", index, composed, query, *everybody)
    assert nothing.out == "answered by the base (base 100%)\nNo document may be found.\n"


def test_who_opted_out_in_the_registry_is_left_out(
    run: Callable[..., Any], composed: Path, collections: Path, pico: Any, tmp_path: Path
) -> None:
    from registry import Registry

    registry = Registry(shutil.copytree(pico.retriever_library().path, tmp_path / "registry"))
    corpus = [part for owner in OWNERS[:2] for part in ("--corpus", collections / owner / "corpus.jsonl")]
    run("index", tmp_path / "index", "--model", composed, *corpus)
    query = json.loads((collections / "acme" / "queries.jsonl").read_text().splitlines()[0])["text"]
    asked = run(
        "search", tmp_path / "index", composed, query, "--opt-out", "acme", "--top-k", 50, "--json"
    ).json
    registry.opt_out("acme", reason="left")
    outcome = run(
        "search", tmp_path / "index", composed, query, "--top-k", 50, "--json", registry=registry.path
    )
    assert outcome.json == asked
    assert outcome.err == "Note: acme has opted out, so the owner's documents are left out.\n"


def test_what_cannot_be_measured_is_said(
    run: Callable[..., Any], composed: Path, collections: Path, tmp_path: Path
) -> None:
    data = ("--data", f"acme={collections / 'acme'}")
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((*data, "--opt-out", "acm"), "Unknown owner 'acm'. Did you mean 'acme'?"),
        (
            (*data, "--max-tokens", 5, "--domain-owner", "acme=acme"),
            "--domain-owner, --max-tokens: not for retriev",
        ),
        (
            ("--data", f"x={tmp_path / 'none'}"),
            f"{tmp_path / 'none'} is not a folder with corpus.jsonl, quer",
        ),
    ]
    for arguments, message in cases:
        outcome = run("evaluate", composed, *arguments)
        assert (outcome.code, outcome.err.startswith(f"Error: {message}")) == (2, True), outcome.err
