"""Retrievers on the command line: a base, public queries, a job, an adapter of PEFT's, and what is shown of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def library(pico: Any) -> Path:
    return pico.retriever_library().path


@pytest.fixture
def empty(run: Any, pico: Any, tmp_path: Path) -> Path:
    """A registry with the embedding base alone."""
    assert run("base", "add", pico.embedder(), "--name", "embedder", registry=tmp_path / "r").code == 0
    return tmp_path / "r"


def queries(pico: Any, path: Path, *, count: int = 12, pairs: bool = False) -> Path:
    texts = pico.domain_texts(1, count=count)
    records = [{"query": t.split()[0], "document": t} if pairs else {"text": t} for t in texts]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_base_show_says_how_it_embeds(run: Any, empty: Path) -> None:
    shape = run("base", "show", "embedder", "--json", registry=empty).json["shape"]
    assert shape["embedding"] == {
        "pooling": "mean",
        "normalize": True,
        "similarity": "cosine",
        "max_seq_length": 64,
        "dimension": 32,
        "prompts": {},
    }


def test_list_show_and_verify(run: Any, library: Path) -> None:
    listed = run("list", "--json", registry=library).json
    assert [(row["name"], row["kind"]) for row in listed] == [
        (f"{owner}/search", "retriever") for owner in ("acme", "bob", "zoe")
    ]
    shown = run("show", "acme/search", registry=library)
    assert shown.code == 0
    assert "retriever" in shown.out
    assert "similarity" in shown.out
    assert run("verify", "acme/search", registry=library).code == 0


def test_train_and_register(run: Any, pico: Any, empty: Path, tmp_path: Path) -> None:
    job = {
        "name": "acme/search",
        "domain": "words",
        "license": "Apache-2.0",
        "base": "embedder",
        "kind": "retriever",
        "data": str(queries(pico, tmp_path / "pairs.jsonl", count=20, pairs=True)),
        "steps": 2,
        "batch_size": 4,
        "workdir": str(tmp_path / "private"),
    }
    (tmp_path / "job.yaml").write_text("".join(f"{key}: {value}\n" for key, value in job.items()))
    out = tmp_path / "trained"
    outcome = run("train", tmp_path / "job.yaml", "--local", "--threads", 1, "--out", out, registry=empty)
    assert outcome.code == 0, outcome.err
    heading, row = outcome.out.splitlines()
    assert heading.split() == ["RETRIEVER", "QUERIES", "BASE", "NDCG@10", "NDCG@10", "FOLDER"]
    assert (row.split()[0], row.split()[1], row.split()[-1]) == ("acme/search", "20", f"{out}/acme/search")
    registered = run("register", out / "acme" / "search", "--json", registry=empty)
    assert registered.code == 0, registered.err
    assert registered.json["version"] == 1


def test_owners_score_experts_on_their_queries(run: Any, pico: Any, empty: Path, tmp_path: Path) -> None:
    job = {
        "name": "acme/search",
        "domain": "words",
        "license": "Apache-2.0",
        "base": "embedder",
        "kind": "retriever",
        "data": str(queries(pico, tmp_path / "pairs.jsonl", count=30, pairs=True)),
        "steps": 1,
        "batch_size": 4,
        "workdir": str(tmp_path / "private"),
        "retrieval": "{label: 0.3, min_group: 3}",
    }
    (tmp_path / "job.yaml").write_text("".join(f"{key}: {value}\n" for key, value in job.items()))
    out = tmp_path / "trained"
    assert run("train", tmp_path / "job.yaml", "--local", "--out", out, registry=empty).code == 0
    assert run("register", out / "acme" / "search", registry=empty).code == 0
    raw = pico.write_retriever(tmp_path / "raw", seed=1)
    options = ("--name", "bob/search", "--domain", "words", "--license", "Apache-2.0", "--base", "embedder")
    text = queries(pico, tmp_path / "queries.jsonl")
    assert run("register", raw, *options, "--text", text, registry=empty).code == 0
    scored = run("expert", "score", tmp_path / "job.yaml", "--out", tmp_path / "scored", registry=empty)
    assert scored.code == 0, scored.err
    assert scored.out.splitlines()[0].split() == ["tried:", "acme/search,", "bob/search"]
    assert scored.out.rstrip().endswith("acme/search@2, to be registered")
    assert run("register", tmp_path / "scored", registry=empty).code == 0
    again = run(
        *("expert", "score", tmp_path / "job.yaml", "--expert", "bob/search", "--json"),
        *("--out", tmp_path / "again"),
        registry=empty,
    )
    assert (again.json["version"], again.json["scores"]["experts"]) == (3, ["acme/search", "bob/search"])
    unknown = run(
        "expert",
        "score",
        tmp_path / "job.yaml",
        "--expert",
        "bob/serch",
        "--out",
        tmp_path / "u",
        registry=empty,
    )
    assert (unknown.code, (tmp_path / "u").exists()) == (2, False)
    assert "bob/search" in unknown.err
    silent = ("--name", "cleo/search", *options[2:])
    assert run("register", raw, *silent, registry=empty).code == 0
    refused = run("expert", "score", tmp_path / "job.yaml", "--out", tmp_path / "u", registry=empty)
    assert (refused.code, refused.err) == (
        2,
        "Error: cleo/search@1 cannot be tried:\n  - cleo/search publishes nothing about its queries\n",
    )


def test_an_adapter_of_pefts_with_queries(run: Any, pico: Any, empty: Path, tmp_path: Path) -> None:
    raw = pico.write_retriever(tmp_path / "raw", seed=1)
    options = ("--name", "acme/search", "--domain", "words", "--license", "Apache-2.0", "--base", "embedder")
    text = queries(pico, tmp_path / "queries.jsonl")
    outcome = run("register", raw, *options, "--text", text, registry=empty)
    assert outcome.code == 0, outcome.err
    routing = run("show", "acme/search", "--json", registry=empty).json["card"]["routing"]["retrieval"]
    assert (routing["queries"], routing["second_moment"], routing["state"]) == (12, False, {"layer": 2})


def test_too_few_queries_publish_nothing(run: Any, pico: Any, empty: Path, tmp_path: Path) -> None:
    raw = pico.write_retriever(tmp_path / "raw", seed=1)
    options = ("--name", "acme/search", "--domain", "words", "--license", "Apache-2.0", "--base", "embedder")
    text = queries(pico, tmp_path / "queries.jsonl", count=9)
    outcome = run("register", raw, *options, "--text", text, registry=empty)
    assert outcome.code == 2
    assert "9 queries; at least 10 are needed, so that what is published is nobody's own." in outcome.err
    assert run("list", "--json", registry=empty).json == []


def test_public_queries(run: Any, pico: Any, empty: Path, tmp_path: Path) -> None:
    text = queries(pico, tmp_path / "public.jsonl", count=15)
    outcome = run("base", "public-routing", "embedder", "--text", text, registry=empty)
    assert outcome.out == (
        "Attached public routing artefacts to base embedder: sums over the embeddings of 15 queries.\n"
    )
    refused = run("base", "public-routing", "embedder", "--text", text, "--rows", registry=empty)
    assert refused.code == 2
    assert (
        "'embedder' is an embedding model: --rows, --inputs and --embedder are for language models."
        in refused.err
    )
