"""Whole query encoders from a job: the chosen layers alone are trained, as the stock model would be without dropout."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from composer.building import build
from composer.loading import load
from composer.manifest import Manifest
from composer.planning import plan
from experts.errors import ManifestError, TrainingError
from experts.fingerprint import checkpoint_files
from experts.package import read_package
from pipelines.train.anchor import ResolvedBase, resolve_base
from pipelines.train.job import DomainJob
from pipelines.train.loop import alike, plan_batches
from pipelines.train.worker import train_job
from registry import Registry

LAYERS = ("encoder.layer.2.", "encoder.layer.3.")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, pico: Any) -> Path:
    """60 queries, each a scrambled half of its document."""
    draw = random.Random(7)
    path: Path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    texts = pico.domain_texts(0, count=60, words=10)
    lines = [{"query": " ".join(draw.sample(text.split(), 4)), "document": text} for text in texts]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def base(pico: Any) -> ResolvedBase:
    with resolve_base(pico.embedder()) as found:
        return found


@pytest.fixture
def job(pairs: Path, pico: Any, tmp_path: Path) -> Callable[..., DomainJob]:
    def make(**changes: Any) -> DomainJob:
        fields = {
            "name": "vic/whole",
            "domain": "words",
            "license": "Apache-2.0",
            "base": str(pico.embedder()),
            "kind": "retriever",
            "data": str(pairs),
            "workdir": str(tmp_path / "work"),
            "steps": 6,
            "batch_size": 8,
            "layers": [2, 3],
            "learning_rate": 1e-3,
            "warmup": 1,
        }
        retrieval = {"form": "full", "second_moment": "always", **changes.pop("retrieval", {})}
        return DomainJob.from_dict({**fields, "retrieval": retrieval, **changes})

    return make


@pytest.fixture
def train(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> Callable[..., tuple[DomainJob, Path]]:
    def run(out: str = "out", **changes: Any) -> tuple[DomainJob, Path]:
        made = job(**changes)
        return made, train_job(made, out=tmp_path / out, base=base, threads=1)

    return run


def _stock(pico: Any, folder: Path, weights: Path | None = None) -> Any:
    """The base as sentence-transformers alone loads it, with the expert's weights where they are given."""
    from sentence_transformers import SentenceTransformer

    shutil.copytree(pico.embedder(), folder)
    if weights is not None:
        shutil.copyfile(weights, folder / "model.safetensors")
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True)


def test_only_the_chosen_layers_change(train: Any, pico: Any) -> None:
    made, folder = train()
    card = read_package(folder)
    own, base = load_file(folder / "model.safetensors"), load_file(pico.embedder() / "model.safetensors")
    changed = {name for name in own if not torch.equal(own[name], base[name])}
    # a key's bias moves all scores of a row alike, so only rounding gives it a gradient
    wanted = {name for name in base if name.startswith(LAYERS) and not name.endswith("key.bias")}
    assert changed - {name for name in base if name.endswith("key.bias")} == wanted
    assert all(name.startswith(LAYERS) for name in changed)
    assert set(own) == set(base)
    assert (card.kind, card.rank) == ("retriever", None)
    assert {entry.path for entry in card.files} == {
        "config.json",
        "model.safetensors",
        "routing.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert card.training is not None
    assert card.training.settings["form"] == "full"
    assert not {"rank", "alpha"} & set(card.training.settings)
    assert list(made.directory.glob("checkpoint-*")) == []


def test_a_step_is_that_of_the_stock_model_without_dropout(
    train: Any, pico: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    """One step of AdamW by hand: all texts through the whole stock model, gradients of all that is trained."""
    from pipelines.train.retriever_run import RetrieverRun

    made, folder = train(steps=1, weight_decay=0.1, warmup=0, grad_clip=0.0, schedule="constant")
    run = RetrieverRun(made, base=base)
    asked = [(query, document) for query, found in run.split.train.items() for document in found]
    run.embed_documents()
    list(run.prepare_states())
    batches = plan_batches(
        steps=1, batch_size=8, own=len(asked), public=0, public_fraction=0.0, seed=made.seed
    )
    rows = {query: row for row, query in enumerate([*run.split.train, *run.split.label, *run.split.test])}
    lengths = np.array([run._states.length(rows[query]) for query, _ in asked])
    chosen = [asked[number] for number in alike(batches, lengths, seed=made.seed)[0]]

    stock = _stock(pico, tmp_path / "stock")
    documents = torch.tensor(
        stock.encode_document([run.domain.documents[number] for number in run.split.negatives])
    )
    features = stock.preprocess([run.domain.queries[query] for query, _ in chosen])
    queries = stock.eval()(features)["sentence_embedding"]
    places = {document: place for place, document in enumerate(run.split.negatives)}
    wanted = torch.tensor([places[document] for _, document in chosen])
    F.cross_entropy(queries @ documents.T / 0.05, wanted).backward()  # type: ignore[no-untyped-call]

    written = load_file(folder / "model.safetensors")
    for name, parameter in stock[0].auto_model.named_parameters():
        if name.startswith(LAYERS) and not name.endswith("key.bias"):
            assert parameter.grad is not None
            decayed = parameter.detach() * (1 - 1e-3 * 0.1 if parameter.dim() > 1 else 1.0)
            moved = decayed - 1e-3 * parameter.grad / (parameter.grad.abs() + 1e-8)  # AdamW's first step
            seen = parameter.grad.abs() > 1e-5  # below, the last bits of a sum decide
            torch.testing.assert_close(written[name][seen], moved[seen], rtol=0, atol=2e-6)


def test_the_reported_ndcg_is_the_stock_models_with_these_weights(
    train: Any, pico: Any, base: ResolvedBase, tmp_path: Path
) -> None:
    from sklearn.metrics import ndcg_score

    from pipelines.train.retriever_run import RetrieverRun

    made, folder = train(steps=40, batch_size=16)
    run, card = RetrieverRun(made, base=base), read_package(folder)
    stock, tuned = _stock(pico, tmp_path / "a"), _stock(pico, tmp_path / "b", folder / "model.safetensors")
    documents = stock.encode_document(list(run.domain.documents))
    texts = [run.domain.queries[query] for query in run.split.test]
    truth = np.zeros((len(texts), len(documents)))
    for row, query in enumerate(run.split.test):
        truth[row, list(run.domain.judgements[query])] = 1
    after = ndcg_score(truth, tuned.encode_query(texts) @ documents.T, k=10)
    assert card.metrics["held_out_ndcg10"] == pytest.approx(after, abs=1e-6)
    assert card.metrics["held_out_ndcg10"] > card.metrics["base_held_out_ndcg10"]


def test_an_interrupted_job_ends_with_the_same_bytes(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path
) -> None:
    from pipelines.train import worker

    made = job(steps=5, checkpoint_every=2, weight_decay=0.1)
    whole = train_job(made, out=tmp_path / "whole", base=base, workdir=tmp_path / "a", threads=1)

    def stop_at_3(report: Any) -> None:
        if report.scalars.get("step") == 3:
            raise KeyboardInterrupt

    def again(progress: Any) -> Path:
        folder, out = tmp_path / "b", tmp_path / "cut"
        return train_job(made, out=out, base=base, workdir=folder, progress=progress, threads=1)

    reports: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker._Reporter, "_INTERVAL", 0.0)
        with pytest.raises(KeyboardInterrupt):
            again(stop_at_3)
        cut = again(reports.append)
    assert reports[-1].scalars["resumed_from"] == 3
    assert {p.name: p.read_bytes() for p in whole.iterdir()} == {
        p.name: p.read_bytes() for p in cut.iterdir()
    }


def test_it_is_composed_beside_an_adapter_and_leaves_exactly(
    train: Any, job: Callable[..., DomainJob], base: ResolvedBase, pico: Any, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    registry.add_base(pico.embedder(), name="embedder")
    own = registry.register(_renamed_base(train, job, registry, "vic/whole", form="full"))
    other = registry.register(_renamed_base(train, job, registry, "ann/low", form="adapter"))

    def model(*experts: str) -> Any:
        manifest = Manifest.from_dict(
            {"name": "pico", "recipe": "router_retriever", "base": "embedder", "experts": list(experts)}
        )
        out = tmp_path / "-".join(name.partition("/")[0] for name in experts)
        return load(build(plan(manifest, registry), out, registry=registry))

    both, alone = model(own.name, other.name), model(other.name)
    queries = pico.domain_texts(0, count=6)
    assert np.array_equal(both.encode_query(queries, opt_out={"vic"}), alone.encode_query(queries))
    whole = _stock(pico, tmp_path / "stock", tmp_path / "vic-whole" / "model.safetensors")
    found = model(own.name).encode_query(queries)
    np.testing.assert_allclose(found, whole.encode_query(queries), rtol=0, atol=1e-6)


def _renamed_base(
    train: Any, job: Callable[..., DomainJob], registry: Registry, name: str, *, form: str
) -> Path:
    """Train with the registry's base, as an owner does who will register there."""
    changes: dict[str, Any] = {"name": name, "base": "embedder", "retrieval": {"form": form}}
    with resolve_base("embedder", registry=registry) as base:
        out = Path(registry.path).parent / name.replace("/", "-")
        return train_job(job(**changes), out=out, base=base, threads=1, version=1)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"rank": 4, "alpha": 8.0}, "rank, alpha: not for `form: full`; leave them out"),
        (
            {"retrieval": {"targets": ["query"], "dropout": 0.1}},
            "retrieval.targets, retrieval.dropout: not for `form: full`; leave them out",
        ),
        (
            {"preset": "paper"},
            "retrieval.form: what was published trains an adapter; leave preset or form out",
        ),
    ],
)
def test_settings_of_adapters_are_refused(
    job: Callable[..., DomainJob], changes: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ManifestError) as caught:
        job(**changes)
    assert caught.value.problems == (problem,)


def test_the_default_rate_is_that_of_whole_models(job: Callable[..., DomainJob]) -> None:
    fields = job().model_dump(mode="json", exclude={"learning_rate"})
    assert DomainJob.from_dict(fields).learning_rate == 5e-5


def test_tensors_under_other_names_cannot_be_written(
    job: Callable[..., DomainJob], base: ResolvedBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prefixed(folder: Path) -> Any:
        found = checkpoint_files(folder)
        return {path: {f"bert.{name}": t for name, t in ts.items()} for path, ts in found.items()}

    monkeypatch.setattr("pipelines.train.retriever_forms.checkpoint_files", prefixed)
    with pytest.raises(TrainingError, match=r"other names, so a whole encoder cannot be written in its form"):
        train_job(job(), out=tmp_path / "out", base=base, threads=1)
    assert not (tmp_path / "out").exists()
