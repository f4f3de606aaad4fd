"""Retrievers: what is trained, what is not, what leaves; against PEFT, sentence-transformers, losses by hand."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.errors import AdmissionError, DataError, ManifestError, UnknownNameError
from experts.package import read_package
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from pipelines.train import train_jobs
from pipelines.train.anchor import ResolvedBase, resolve_base
from pipelines.train.job import DomainJob
from pipelines.train.worker import train_job as train_with_all_threads

CANARY = "xqzcanary"
NOISE = {"epsilon": 1.0, "release": "moments"}
SMALL = {
    "steps": 6,
    "batch_size": 8,
    "rank": 2,
    "layers": [2, 3],
    "learning_rate": 1e-2,
    "warmup": 1,
    "retrieval": {"second_moment": "always", "static_statistics": True},
}


def train_job(job: DomainJob, **settings: Any) -> Path:
    return train_with_all_threads(job, threads=1, **settings)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, pico: Any) -> Path:
    """60 queries, each a scrambled half of its document; and one that must never be seen again."""
    draw = random.Random(7)
    lines = []
    for text in pico.domain_texts(0, count=60, words=10):
        words = text.split()
        lines.append({"query": " ".join(draw.sample(words, 4)), "document": text})
    lines.append({"query": f"{CANARY} asks", "document": f"{CANARY} answers"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(pico: Any) -> ResolvedBase:
    with resolve_base(pico.embedder()) as found:
        return found


@pytest.fixture
def job(pairs: Path, pico: Any, tmp_path: Path) -> Callable[..., DomainJob]:
    def make(**changes: Any) -> DomainJob:
        retrieval = {**SMALL["retrieval"], **changes.pop("retrieval", {})}  # type: ignore[dict-item]
        fields = {
            "name": "acme/search",
            "domain": "words",
            "license": "Apache-2.0",
            "base": str(pico.embedder()),
            "kind": "retriever",
            "data": str(pairs),
            "workdir": str(tmp_path / "work"),
            **SMALL,
            "retrieval": retrieval,
            **changes,
        }
        return DomainJob.from_dict(fields)

    return make


@pytest.fixture(scope="module")
def trained(pairs: Path, pico: Any, base: ResolvedBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run after training, and the packed expert."""
    from pipelines.train import retriever_job

    root = tmp_path_factory.mktemp("trained")
    made = DomainJob.from_dict(
        {
            "name": "acme/search",
            "domain": "words",
            "license": "Apache-2.0",
            "base": str(pico.embedder()),
            "kind": "retriever",
            "data": str(pairs),
            "workdir": str(root / "work"),
            **SMALL,
        }
    )
    runs = []
    train = retriever_job.train_retriever

    def spy(*args: Any, **kwargs: Any) -> Any:
        runs.append(train(*args, **kwargs))
        return runs[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retriever_job, "train_retriever", spy)
        reports: list[Any] = []
        folder = train_job(made, out=root / "out", base=base, progress=reports.append)
    return runs[0], folder, reports


def with_peft(pico: Any, folder: Path) -> Any:
    """The stock embedding model with the adapter as PEFT loads it."""
    import warnings

    from peft import PeftModel
    from sentence_transformers import SentenceTransformer

    stock = SentenceTransformer(str(pico.embedder()), device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock[0].model = PeftModel.from_pretrained(stock[0].auto_model, folder).eval()
    return stock


@pytest.fixture(scope="module")
def prepared(trained: Any, base: ResolvedBase, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run with everything embedded and nothing attached."""
    from pipelines.train.retriever_run import RetrieverRun

    fields = trained[0].job.model_dump(mode="json") | {"workdir": str(tmp_path_factory.mktemp("prepared"))}
    run = RetrieverRun(DomainJob.from_dict(fields), base=base)
    run.embed_documents()
    list(run.prepare_states())
    return run


# ------------------------------------------------------------ what is trained, and what is not


def test_only_the_adapters_change_and_documents_keep_their_bits(trained: Any, pico: Any) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    run, _, _ = trained
    stock = SentenceTransformer(str(pico.embedder()), device="cpu")
    own = {name.replace(".base.", "."): value for name, value in run.model.encoder.state_dict().items()}
    for name, value in stock[0].auto_model.state_dict().items():
        assert torch.equal(own[name], value), name
    changed = {name for name in own if "lora" in name}
    linears = ("attention.self.query", "attention.self.value", "intermediate.dense")
    assert changed == {
        f"encoder.layer.{layer}.{linear}.lora_{part}"
        for layer in (2, 3)
        for linear in linears
        for part in "ab"
    }
    assert all(bool(own[name].any()) for name in changed)  # every B has left zero
    expected = stock.encode_document(
        list(run.domain.documents), batch_size=32, convert_to_tensor=True, show_progress_bar=False
    )
    stored = [path for path in run.job.directory.glob("documents-*.safetensors")]
    from safetensors.torch import load_file

    assert torch.equal(load_file(stored[0])["documents"], expected)
    assert stored[0].stat().st_mode & 0o077 == 0


def test_a_step_runs_no_document_and_no_lower_layer(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    from pipelines.train.retriever_run import RetrieverRun

    run = RetrieverRun(job(), base=base)
    run.job.directory.mkdir(parents=True)
    calls = {"documents": 0, "layers": [0, 0, 0, 0]}
    encode = run.model.model.encode_document

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["documents"] += 1
        return encode(*args, **kwargs)

    run.model.model.encode_document = counted
    for number, layer in enumerate(run.model.encoder.encoder.layer):

        def count(*_: Any, number: int = number) -> None:
            calls["layers"][number] += 1

        layer.register_forward_pre_hook(count)
    run.embed_documents()
    list(run.prepare_states())
    run.attach()
    assert calls["documents"] == 1
    calls["layers"] = [0, 0, 0, 0]
    run.train(checkpoint=tmp_path / "checkpoint", on_step=lambda *_: None)
    assert calls == {"documents": 1, "layers": [0, 0, 6, 6]}


def test_peft_alone_computes_the_same(trained: Any, pico: Any) -> None:
    import torch
    from sentence_transformers import SentenceTransformer

    run, folder, _ = trained
    stock = SentenceTransformer(str(pico.embedder()), device="cpu")
    before = stock.encode_query([run.domain.queries[n] for n in run.split.test], convert_to_tensor=True)
    after = with_peft(pico, folder).encode_query(
        [run.domain.queries[n] for n in run.split.test], convert_to_tensor=True
    )
    with torch.no_grad():
        own = run._embed([run._row[n] for n in run.split.test])
    assert float((after - own).abs().max()) < 1e-5
    assert float((after - before).abs().max()) > 1e-2


@pytest.mark.parametrize("layers", ["all", [0, 2]])
def test_layers_from_the_first_on(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path, layers: Any, pico: Any
) -> None:
    batch = {"negatives": "batch", "hard_negatives": 2} if layers == "all" else {}
    folder = train_job(job(layers=layers, steps=2, retrieval=batch), out=tmp_path / "out", base=base)
    assert read_package(folder).layers == ((0, 1, 2, 3) if layers == "all" else (0, 2))
    with_peft(pico, folder)


def test_training_pulls_queries_to_their_documents(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    folder = train_job(job(steps=60, batch_size=16), out=tmp_path / "out", base=base)
    metrics = read_package(folder).metrics
    assert metrics["held_out_ndcg10"] > metrics["base_held_out_ndcg10"] + 0.05


def test_the_reported_ndcg_is_the_packed_experts(trained: Any, pico: Any) -> None:
    """Stock sentence-transformers and PEFT rank the documents; the measure is scikit-learn's."""
    from sentence_transformers import SentenceTransformer
    from sklearn.metrics import ndcg_score

    run, folder, _ = trained
    card = read_package(folder)
    stock = SentenceTransformer(str(pico.embedder()), device="cpu")
    documents = stock.encode_document(list(run.domain.documents))
    truth = np.zeros((len(run.split.test), len(documents)))
    for row, query in enumerate(run.split.test):
        truth[row, list(run.domain.judgements[query])] = 1
    texts = [run.domain.queries[query] for query in run.split.test]
    before = ndcg_score(truth, stock.encode_query(texts) @ documents.T, k=10)
    after = ndcg_score(truth, with_peft(pico, folder).encode_query(texts) @ documents.T, k=10)
    assert card.metrics["base_held_out_ndcg10"] == pytest.approx(before, abs=1e-6)
    assert card.metrics["held_out_ndcg10"] == pytest.approx(after, abs=1e-6)


# ------------------------------------------------------------ what leaves


def test_statistics_are_sums_over_training_and_label_queries(trained: Any, pico: Any) -> None:
    from sentence_transformers import SentenceTransformer

    run, folder, _ = trained
    card = read_package(folder)
    found = RoutingArtifacts.load(folder, card.routing, hidden_size=32).retrieval
    own = [run.domain.queries[n] for n in (*run.split.train, *run.split.label)]
    stock = SentenceTransformer(str(pico.embedder()), device="cpu")
    x = stock.encode_query(own).astype("f8")
    assert found.info.queries == len(own)
    np.testing.assert_allclose(found.embedding.sum, x.sum(0), atol=1e-4)
    np.testing.assert_allclose(found.embedding.scatter, x.T @ x, atol=1e-4)
    (pilot,) = found.pilots
    # of the same queries as the sums: of another set, the difference would be the few that only one has
    assert (pilot.expert, pilot.queries) == ("acme/search", len(own))
    np.testing.assert_allclose(pilot.queries * pilot.vector, found.embedding.sum, atol=1e-5)
    _, states = pico._embed(own, 2)
    assert found.info.state.layer == 2
    np.testing.assert_allclose(found.state.sum, states.astype("f8").sum(0), atol=1e-4)
    np.testing.assert_allclose(found.state.scatter, states.T.astype("f8") @ states, atol=1e-3)
    tokens = pico._token_means(own).astype("f8")
    np.testing.assert_allclose(found.static.sum, tokens.sum(0), atol=1e-4)
    np.testing.assert_allclose(found.static.scatter, tokens.T @ tokens, atol=1e-4)


def test_r12_nothing_that_is_published_knows_a_test_query(prepared: Any, pico: Any) -> None:
    """The sides share no query and no document; sums, pilot and labels are the other two's, to the bit."""
    split, domain = prepared.split, prepared.domain
    sides = [split.test, split.label, split.train]
    queries = [{domain.queries[n] for n in side} for side in sides]
    documents = [{d for answers in side.values() for d in answers} for side in sides]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not queries[first] & queries[second]
        assert not documents[first] & documents[second]
    assert all(sides)
    made = prepared.artifacts()
    changed = dict.fromkeys((prepared._row[n] for n in split.test), True)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_embeddings", "_mean_states", "_mean_tokens"):
            rows = getattr(prepared, name)
            patch.setattr(
                prepared, name, [row * np.nan if i in changed else row for i, row in enumerate(rows)]
            )
        again = prepared.artifacts()
    for name, tensor in made.tensors().items():
        assert np.array_equal(again.tensors()[name], tensor), name
    assert made.info.queries + len(split.test) == len(domain.queries)


def test_noise_is_said_in_the_card(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pico: Any
) -> None:
    noise = {"epsilon": 4.0, "delta": 1e-3, "release": "moments"}
    fields = prepared.job.model_dump(mode="json") | {"workdir": str(tmp_path), "statistics": {"noise": noise}}
    monkeypatch.setattr(prepared, "job", DomainJob.from_dict(fields))
    prepared.job.directory.mkdir(parents=True)
    made, again = prepared.artifacts(), prepared.artifacts()
    assert (made.info.noise.unit, made.info.noise.epsilon, made.info.noise.delta) == ("query", 4.0, 1e-3)
    assert (made.pilots, made.info.pilots) == ((), None)
    assert made.info.second_moment
    assert {k: v.tobytes() for k, v in made.tensors().items()} == {
        k: v.tobytes() for k, v in again.tensors().items()
    }
    assert (prepared.job.directory / "noise.key").stat().st_mode & 0o777 == 0o600
    # what is noisy passes as sums of queries, for whoever admits it
    RoutingArtifacts(info=RoutingInfo(retrieval=made.info), tensors=made.tensors()).save(tmp_path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip": 1.0}, "statistics.noise.clip: every query of a retriever has length 1; leave it out"),
        (
            {"release": "mean"},
            "retrieval.second_moment is 'always', but statistics.noise.release 'mean' publishes none; write release: "
            "moments",
        ),
    ],
)
def test_noise_that_cannot_be(job: Callable[..., DomainJob], changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ManifestError) as caught:
        job(statistics={"noise": {"epsilon": 1.0, "release": "moments", **changes}})
    assert problem in str(caught.value)


def test_noise_needs_features_of_bounded_length(job: Callable[..., DomainJob], pico: Any) -> None:
    from pipelines.train.retriever_run import RetrieverRun

    folder = pico.embedder(normalize=False, similarity="dot")
    made = job(base=str(folder), statistics={"noise": {"epsilon": 1.0, "release": "moments"}})
    with resolve_base(folder) as base, pytest.raises(ManifestError) as caught:
        RetrieverRun(made, base=base)
    assert str(caught.value) == (
        "statistics.noise needs queries of bounded length, and the base does not divide its embeddings by theirs. "
        "Leave it out, or publish nothing (statistics: false)."
    )


def test_nothing_of_the_text_leaves(trained: Any) -> None:
    run, folder, reports = trained
    assert any(CANARY in query for query in run.domain.queries)
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
        "routing.safetensors",
    }
    for path in [*folder.iterdir(), *run.job.directory.rglob("*")]:
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes()
    assert CANARY not in "".join(report.to_line() for report in reports)
    assert not list(run.job.directory.glob("checkpoint-*"))


@pytest.mark.parametrize(("choice", "there"), [("auto", False), ("never", False), ("always", True)])
def test_the_second_moment_needs_more_queries_than_dimensions(
    prepared: Any, monkeypatch: pytest.MonkeyPatch, choice: str, there: bool
) -> None:
    settings = prepared.settings.model_copy(update={"second_moment": choice})
    monkeypatch.setattr(prepared, "settings", settings)
    assert prepared.artifacts().info.second_moment is there


def test_small_owners_publish_no_vector(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    own = len(prepared.split.train) + len(prepared.split.label)
    for least, published in ((own + 1, None), (own, [own])):
        settings = prepared.settings.model_copy(update={"min_group": least})
        monkeypatch.setattr(prepared, "settings", settings)
        made = prepared.artifacts()
        assert (made and [pilot.queries for pilot in made.pilots]) == published


def test_statistics_can_be_kept(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    job = DomainJob.from_dict({**prepared.job.model_dump(mode="json"), "statistics": False})
    monkeypatch.setattr(prepared, "job", job)
    assert prepared.artifacts() is None


# ------------------------------------------------------------ repeatable


def test_an_interrupted_job_ends_with_the_same_bytes(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    made = job(retrieval={"dropout": 0.2}, steps=8, checkpoint_every=3)
    whole = train_job(made, out=tmp_path / "whole", base=base, workdir=tmp_path / "a")

    def stop_at_5(report: Any) -> None:
        if report.scalars.get("step") == 5:
            raise KeyboardInterrupt

    from pipelines.train import worker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker._Reporter, "_INTERVAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            train_job(made, out=tmp_path / "cut", base=base, workdir=tmp_path / "b", progress=stop_at_5)
        assert list((tmp_path / "b").rglob("checkpoint-*"))
        resumed: list[Any] = []
        cut = train_job(
            made, out=tmp_path / "cut", base=base, workdir=tmp_path / "b", progress=resumed.append
        )
    assert resumed[-1].scalars["resumed_from"] == 5
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in cut.iterdir()
    }


def test_another_seed_is_another_expert_on_the_same_split(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    cards = [
        read_package(train_job(job(seed=seed, steps=2), out=tmp_path / f"{seed}", base=base))
        for seed in (0, 1)
    ]
    assert cards[0].metrics["base_held_out_ndcg10"] == cards[1].metrics["base_held_out_ndcg10"]
    assert cards[0].files[1].sha256 != cards[1].files[1].sha256


def test_jobs_train_and_register_like_any_other(
    job: Callable[..., DomainJob], pico: Any, tmp_path: Path
) -> None:
    from registry import Registry

    registry = Registry(tmp_path / "registry")
    registry.add_base(pico.embedder(), name="embedder")
    made = job(base="embedder", steps=2)
    (outcome,) = train_jobs([made], out_dir=tmp_path / "out", registry=registry, runner="local")
    assert outcome.error is None
    record = registry.register(outcome.folder)
    assert (record.kind, record.base_name, record.domain) == ("retriever", "embedder", "words")
    again = train_jobs([made], out_dir=tmp_path / "out", registry=registry, runner="local")
    assert again[0].folder == outcome.folder  # nothing is trained twice


def test_owners_score_each_other_and_an_expert_who_joins_is_scored_alone(
    job: Callable[..., DomainJob], pico: Any, tmp_path: Path
) -> None:
    """Whoever publishes scores can be routed by pilots; the next expert costs each owner a column and no more."""
    from composer import Manifest, plan
    from pipelines.train.score_experts import score_experts
    from registry import Registry

    registry = Registry(tmp_path / "registry")
    registry.add_base(pico.embedder(), name="embedder")
    made = job(base="embedder", steps=2, retrieval={"label": 0.3, "min_group": 3})
    (outcome,) = train_jobs([made], out_dir=tmp_path / "out", registry=registry, runner="local")
    registry.register(outcome.folder)
    for seed, owner in enumerate(("bob", "cleo")):
        raw = pico.write_retriever(pico.scratch("raw"), seed=seed)
        artifacts = pico.retrieval_artifacts(1)
        registry.register(pico.pack_retriever(raw, name=f"{owner}/search", artifacts=artifacts))
    first = score_experts(made, registry=registry, experts=["bob/search"], out=tmp_path / "scored")
    info = read_package(first.folder).routing.retrieval
    assert (info.scores.experts, info.scores.split) == (("acme/search", "bob/search"), "heldout")
    assert first.measured == 3 * info.scores.queries  # the base's, acme's and bob's
    assert info.scores.queries // info.scores.rows >= info.min_group == 3
    both = ["bob/search", "cleo/search"]
    more = score_experts(made, registry=registry, experts=both, out=tmp_path / "more")
    assert more.measured == info.scores.queries
    shutil.rmtree(made.directory)
    scratch = score_experts(made, registry=registry, experts=both[::-1], out=tmp_path / "scratch")
    assert scratch.measured == 4 * info.scores.queries
    for name in ("routing.safetensors", "card.json"):
        assert (scratch.folder / name).read_bytes() == (more.folder / name).read_bytes()
    registry.register(more.folder)
    manifest = {
        "name": "pilots",
        "recipe": "router_retriever",
        "base": "embedder",
        "experts": ["acme/search"],
        "router": {"scorer": "pilot_mean", "min_group": 1},
    }
    assert plan(Manifest.from_dict(manifest), registry).optout_class == "exact"


def test_the_sealed_task_trains_from_plain_text(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    """What an owner's process is told and gives back, and what its agent then delivers."""
    from pipelines.train.agent import Order, release
    from pipelines.train.agent_task import TaskRequest, run_sealed

    made = job(steps=2)
    request = TaskRequest(
        job=made.model_dump_json(),
        base=base.to_json(),
        out=str(tmp_path / "outbox"),
        version=1,
        threads=1,
        reports=str(tmp_path / "reports"),
        stop=str(tmp_path / "stop"),
    )
    result = run_sealed(request.to_json())
    assert result.error is None
    assert {"held_out_ndcg10", "base_held_out_ndcg10", "queries"} <= result.scalars.keys()
    assert CANARY not in (tmp_path / "reports").read_text()
    order = Order(
        job=made, base=ResolvedBase.from_json(base.to_json()), out=tmp_path / "out" / "search", version=1
    )
    release(order, outbox=tmp_path / "outbox")
    assert read_package(order.out).kind == "retriever"


# ------------------------------------------------------------ the loss


def loss_parts(*, whole: bool, hard: bool) -> Any:
    import torch
    from torch import nn

    from pipelines.train.retriever_loop import PairTable, RankingLoss

    generator = torch.Generator().manual_seed(0)
    documents = torch.randn(9, 4, generator=generator)
    vectors = torch.randn(5, 4, generator=generator)

    class Model(nn.Module):
        def forward(self, features: Any) -> Any:
            return {"sentence_embedding": vectors[features["input_ids"]]}

    table = PairTable(
        queries=np.array([0, 1, 1, 4]),
        documents=np.array([3, 3, 7, 0]),
        answers={0: [3], 1: [3, 7], 4: [0]},
        hard=np.array([[1, 2], [4, 5], [0, 0], [0, 0], [8, 2]]) if hard else None,
    )
    loss = RankingLoss(Model(), documents, table, temperature=0.5, cosine=True, whole=whole)
    return loss, table, vectors, documents


@pytest.mark.parametrize(("whole", "hard"), [(True, False), (False, False), (False, True)])
def test_the_loss_is_the_cross_entropy_over_the_right_columns(whole: bool, hard: bool) -> None:
    import math

    import torch

    loss, table, vectors, documents = loss_parts(whole=whole, hard=hard)
    numbers = [0, 1, 2, 3]
    got = loss([{"input_ids": torch.from_numpy(table.queries[numbers])}], torch.tensor(numbers))
    columns = set(range(9)) if whole else {3, 7, 0} | ({1, 2, 4, 5, 8} if hard else set())
    expected = []
    for number in numbers:
        query, wanted = int(table.queries[number]), int(table.documents[number])
        cosine = {
            c: float(vectors[query] @ documents[c] / vectors[query].norm() / documents[c].norm()) / 0.5
            for c in columns
            if c == wanted or c not in table.answers[query]
        }
        expected.append(math.log(sum(map(math.exp, cosine.values()))) - cosine[wanted])
    assert float(got) == pytest.approx(np.mean(expected), abs=1e-6)


def test_hard_negatives_are_what_the_base_ranks_first(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepared.settings.model_copy(update={"negatives": "batch", "hard_negatives": 3})
    monkeypatch.setattr(prepared, "settings", settings)
    pairs = prepared._pairs()
    documents = prepared._documents[list(prepared.split.negatives)].numpy()
    assert pairs.hard is not None
    for row, answers in pairs.answers.items():
        scores = documents @ prepared._embeddings[row].numpy()
        order = [n for n in np.argsort(-scores) if n not in answers]
        assert set(pairs.hard[row]) == set(order[:3])


def test_too_few_documents_for_hard_negatives(prepared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepared.settings.model_copy(update={"negatives": "batch", "hard_negatives": 64})
    monkeypatch.setattr(prepared, "settings", settings)
    with pytest.raises(ManifestError) as caught:
        prepared._pairs()
    assert str(caught.value) == (
        f"retrieval.hard_negatives is 64, and the domain has only {len(prepared.split.negatives)} training documents."
    )


# ------------------------------------------------------------ the job


def test_defaults_and_the_papers_values(job: Callable[..., DomainJob], pairs: Path, pico: Any) -> None:
    plain = {
        "name": "a/b",
        "domain": "x",
        "license": "MIT",
        "base": "b",
        "kind": "retriever",
        "data": str(pairs),
    }
    ours = DomainJob.from_dict(plain)
    assert (ours.rank, ours.alpha, ours.steps, ours.batch_size, ours.held_out) == (8, 32.0, 60, 32, 0.2)
    assert ours.retrieval is not None
    assert (ours.retrieval.negatives, ours.retrieval.temperature) == ("domain", 0.05)
    paper = DomainJob.from_dict({**plain, "preset": "paper", "steps": 500, "rank": 4})
    assert paper.retrieval is not None
    assert (paper.layers, paper.rank, paper.learning_rate, paper.schedule, paper.warmup) == (
        "all",
        4,
        1e-4,
        "linear",
        50,
    )
    assert (paper.retrieval.negatives, paper.retrieval.dropout) == ("batch", 0.1)
    assert paper.retrieval.targets == ("query", "value")
    assert ours.card_settings()["negatives"] == "domain"
    assert DomainJob.model_validate_json(paper.model_dump_json()) == paper  # as the hub sends it to an agent


def test_fields_of_language_models_are_refused(job: Callable[..., DomainJob], pairs: Path) -> None:
    with pytest.raises(ManifestError) as caught:
        job(sequence_length=64, held_out=str(pairs), statistics={"noise": NOISE | {"clip": 1.0}})
    assert caught.value.problems == (
        "sequence_length: not for retrievers; leave them out; statistics.noise.clip: every query of a retriever has "
        "length 1; leave it out; held_out must be a share for retrievers",
    )
    with pytest.raises(ManifestError, match="retrieval is for the kind 'retriever' only; leave it out"):
        job(kind="lora", data=str(pairs))


def test_hard_negatives_beside_the_whole_domain_are_refused(job: Callable[..., DomainJob]) -> None:
    with pytest.raises(ManifestError) as caught:
        job(retrieval={"hard_negatives": 5})
    assert caught.value.problems == (
        "retrieval.hard_negatives: with `negatives: domain` all of the domain's documents are negatives, the hard "
        "ones too; leave it out, or write negatives: batch",
    )


def test_data_that_are_no_pairs_are_refused(job: Callable[..., DomainJob], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    with pytest.raises(ManifestError) as caught:
        job(data=[str(tmp_path / "text.txt"), str(tmp_path / "none.jsonl")])
    assert caught.value.problems == (
        "data: 'text.txt' is neither a .jsonl file nor a folder with corpus.jsonl; there is no file "
        f"'{tmp_path / 'none.jsonl'}'",
    )


def test_a_language_model_is_no_base(job: Callable[..., DomainJob], pico: Any, tmp_path: Path) -> None:
    with pytest.raises(AdmissionError, match=r"An expert of kind 'retriever' is made for an embedding model"):
        train_job(job(base=str(pico.base())), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_targets_name_the_nearest(job: Callable[..., DomainJob], base: ResolvedBase) -> None:
    from pipelines.train.retriever_run import RetrieverRun

    with pytest.raises(UnknownNameError, match=r"Unknown target 'quary'.*attention.self.query"):
        RetrieverRun(job(retrieval={"targets": ["quary"]}), base=base)


def test_a_loss_that_is_not_finite_stops_the_job(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    from experts.errors import TrainingError

    with pytest.raises(TrainingError, match=r"The loss is nan at step \d of 6\. Lower learning_rate"):
        train_job(job(learning_rate=1e30, grad_clip=0.0), out=tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_an_empty_file_is_refused(job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"The data hold no pair"):
        train_job(job(data=str(tmp_path / "empty.jsonl")), out=tmp_path / "out", base=base)


def test_files_of_the_base_alone_suffice(pico: Any, tmp_path: Path) -> None:
    """The registry's copy of the base embeds as the folder does."""
    from sentence_transformers import SentenceTransformer

    folder = shutil.copytree(pico.embedder(), tmp_path / "copy")
    texts = pico.domain_texts(1, count=3)
    expected = SentenceTransformer(str(folder), device="cpu").encode_query(texts)
    with resolve_base("embedder", registry=pico.retriever_library()) as found:
        got = SentenceTransformer(str(found.folder), device="cpu").encode_query(texts)
    assert np.array_equal(got, expected)
