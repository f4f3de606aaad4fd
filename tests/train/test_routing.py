"""Public artefacts and the starting values of rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.errors import DataError, ManifestError, TrainingError
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from experts.routing_origin import embedder_digest
from pipelines.train.routing import public_routing
from pipelines.train.rows import (
    centred,
    embedding_row,
    mean_embedding,
    random_rows,
    rotated,
    rows_digest,
)
from pipelines.train.windows import make_windows, read_documents


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_public_artefact(anchor, texts, tmp_path, family):
    documents = read_documents([texts["public"]])
    folder = public_routing(
        anchor(family),
        documents,
        out=tmp_path / "out",
        layer=1,
        rows_layers=(1, 3),
        sequence_length=32,
        windows=20,
    )
    info = RoutingInfo.model_validate_json((folder / "routing.json").read_bytes())
    artifacts = RoutingArtifacts.load(folder, info, hidden_size=32)
    model = AutoModelForCausalLM.from_pretrained(anchor(family)).eval()
    tokenizer = AutoTokenizer.from_pretrained(anchor(family))
    ids = make_windows(documents, tokenizer, sequence_length=32, limit=20, seed=0).ids
    inputs = {}
    layers = model.gpt_neox.layers if family == "gpt_neox" else model.model.layers
    for layer in (1, 3):
        layers[layer].mlp.register_forward_pre_hook(
            lambda m, args, layer=layer: inputs.__setitem__(layer, args[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states[1]
    x = states.flatten(0, 1).double().numpy()
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6)
    assert artifacts.statistics.count == len(x) == 20 * 32
    np.testing.assert_allclose(artifacts.statistics.scatter, x.T @ x, rtol=1e-5, atol=1e-5)
    for layer, given in inputs.items():
        mean = given.mean(dim=0)
        expected = 0.5 * mean / mean.norm() / given.square().mean().sqrt()
        np.testing.assert_allclose(artifacts.row(layer)[0], expected.numpy(), rtol=1e-4, atol=1e-6)
    assert info.rows.layers == (1, 3)
    assert not info.rows.has_bias


def test_a_folder_that_exists(anchor, tmp_path):
    with pytest.raises(DataError) as caught:
        public_routing(anchor(), ["text"], out=tmp_path, layer=1)
    assert str(caught.value) == f"'{tmp_path}' exists already. Choose another folder, or remove it."


def test_a_layer_that_does_not_exist(anchor, tmp_path):
    with pytest.raises(TrainingError) as caught:
        public_routing(anchor(), ["text"], out=tmp_path / "out", layer=1, rows_layers=(4,))
    assert str(caught.value) == "layer 4 does not exist; the base has layers 0 to 3."
    assert not (tmp_path / "out").exists()


def test_random_rows_are_the_owners_own_and_the_same_every_time():
    mine, again = (random_rows((1, 2), hidden_size=64, label="acme/a") for _ in range(2))
    other = random_rows((1, 2), hidden_size=64, label="bell/b")
    assert torch.equal(mine[1], again[2])
    assert mine[1].norm() == pytest.approx(0.5)
    assert abs(torch.cosine_similarity(mine[1], other[1], dim=0)) < 0.5


@pytest.mark.parametrize("hidden", [8, 16, 40])
def test_an_embedding_becomes_a_row_of_the_hidden_size(monkeypatch, tmp_path, hidden):
    vectors = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)

    class Encoder:
        def __init__(self, path, **_):
            assert path == str(tmp_path)

        def encode(self, documents, **settings):
            assert settings["normalize_embeddings"]
            return vectors[: len(documents)]

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", Encoder)
    mean = mean_embedding(["a"] * 5, model=tmp_path)
    row = embedding_row(mean, hidden_size=hidden)
    np.testing.assert_allclose(mean, vectors.mean(axis=0), rtol=1e-6)
    assert row.shape == (hidden,)
    assert torch.equal(row, embedding_row(mean, hidden_size=hidden))
    if hidden >= 16:  # an orthonormal map into more dimensions keeps lengths
        assert float(row.norm()) == pytest.approx(float(np.linalg.norm(mean)), rel=1e-5)


def _unit(seed: int, *, width: int = 16) -> torch.Tensor:
    row = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return row / row.norm()


def test_centring_keeps_the_direction_from_the_public_row_and_the_rows_length():
    """Embeddings that share most of their direction become as far apart as they can be."""
    common = _unit(0)
    public, owners = common + 0.2 * _unit(1), [common + 0.2 * _unit(seed) for seed in (2, 3)]
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(owners[0], owners[1], dim=0) > 0.9
    moved = [centred(own, public) - public for own in owners]
    for own, difference in zip(owners, moved, strict=True):
        torch.testing.assert_close(difference.norm(), own.norm())
        assert cosine(difference, own - public, dim=0) == pytest.approx(1, abs=1e-5)
    assert cosine(moved[0], moved[1], dim=0) < 0.8
    # softmax over [public, own] sees the difference alone: shifting both rows by any vector changes nothing
    h, shift = torch.randn(5, 16), _unit(9)
    rows = torch.stack([public, centred(owners[0], public)])
    torch.testing.assert_close(torch.softmax(h @ rows.T, dim=-1), torch.softmax(h @ (rows - shift).T, dim=-1))


def test_a_rotation_keeps_angles_between_owners_and_nothing_else():
    public, owners = _unit(0), [_unit(seed) for seed in (1, 2)]
    turned = [rotated(own, public, seed=5) - public for own in owners]
    plain = [own - public for own in owners]
    for a, b in ((0, 0), (0, 1), (1, 1)):
        assert float(turned[a] @ turned[b]) == pytest.approx(float(plain[a] @ plain[b]), abs=1e-5)
    assert abs(torch.cosine_similarity(turned[0], plain[0], dim=0)) < 0.9
    assert torch.equal(rotated(owners[0], public, seed=5), rotated(owners[0], public, seed=5))
    assert not torch.allclose(rotated(owners[0], public, seed=6), rotated(owners[0], public, seed=5))


class _Encoder:
    """Embeds a text by the letters it has; folders with 'wide' in their names give vectors of 40 numbers."""

    def __init__(self, path, **_):
        self.width = 40 if "wide" in path else 16

    def encode(self, documents, **_):
        counts = [[text.count(chr(97 + n % 26)) + 1.0 for n in range(self.width)] for text in documents]
        return np.array([np.array(row) / np.linalg.norm(row) for row in counts], dtype=np.float32)


@pytest.fixture
def embedder(monkeypatch, tmp_path):
    """Folders of two made-up embedders."""
    from safetensors.numpy import save_file

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", _Encoder)
    for name in ("small", "wide"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "modules.json").write_text("[]")
        save_file({"table": np.full(2, len(name), dtype="f4")}, tmp_path / name / "model.safetensors")
    return tmp_path / "small"


def _public(anchor, texts, out, **options):
    """The pico anchor as a base that publishes an artefact made with these options."""
    from dataclasses import replace

    from pipelines.train.anchor import resolve_base

    with resolve_base(str(anchor())) as base:
        public_routing(
            base,
            read_documents([texts["public"]]),
            out=out,
            layer=2,
            sequence_length=32,
            windows=8,
            **options,
        )
        info = RoutingInfo.model_validate_json((out / "routing.json").read_bytes())
        return replace(base, routing_file=out / info.file, routing_info=info)


def _trained_row(job, base, out):
    from experts.package import read_package
    from pipelines.train.worker import train_job

    folder = train_job(job, out=out, base=base, threads=1)
    artifacts = RoutingArtifacts.load(folder, read_package(folder).routing)
    return (
        torch.from_numpy(np.array(artifacts.row(2)[0])),
        artifacts,
        json.loads((folder / "card.json").read_text()),
    )


def test_a_job_starts_at_the_centred_and_rotated_embedding(anchor, texts, embedder, make_job, tmp_path):
    """With a learning rate too small to move them, rows are what they start at, computed here by hand."""
    base = _public(anchor, texts, tmp_path / "public", rows_layers=(2, 3), embedder=embedder)
    artifacts = base.routing()
    assert artifacts.info.rows.init == "sentence-transformer"
    assert (artifacts.info.embedding.model, artifacts.info.embedding.dim) == ("small", 16)
    public = torch.from_numpy(np.array(artifacts.row(2)[0]))
    own_embedding = mean_embedding(read_documents([texts["law"]]), model=embedder)
    own = embedding_row(own_embedding, hidden_size=32)
    settings = {
        "coordination": True,
        "row_init": str(embedder),
        "held_out": 0,
        "steps": 1,
        "learning_rate": 1e-12,
    }
    expected = {
        "plain": ({}, own),
        "centred": ({"row_centre": True}, public + (own - public) / (own - public).norm() * own.norm()),
        "rotated": ({"row_rotation": 3}, rotated(own, public, seed=3)),
    }
    for name, (extra, row) in expected.items():
        found, written, card = _trained_row(make_job(**settings, **extra), base, tmp_path / name)
        torch.testing.assert_close(found, row, rtol=0, atol=1e-5)
        np.testing.assert_allclose(written.embedding, own_embedding, rtol=1e-6)
        assert card["training"]["settings"]["row_centre"] == ("row_centre" in extra)
        assert card["training"]["settings"]["row_rotation"] == extra.get("row_rotation")
    assert len({str(row) for _, row in expected.values()}) == 3


def test_rows_at_the_anchors_states_can_be_centred_too(anchor, texts, make_job, tmp_path):
    base = _public(anchor, texts, tmp_path / "public", rows_layers=(2, 3))
    public = torch.from_numpy(np.array(base.routing().row(2)[0]))
    settings = {"coordination": True, "steps": 1, "learning_rate": 1e-12}
    plain, _, _ = _trained_row(make_job(**settings), base, tmp_path / "plain")
    moved, _, _ = _trained_row(make_job(**settings, row_centre=True), base, tmp_path / "centred")
    torch.testing.assert_close(moved, centred(plain, public), rtol=0, atol=1e-5)


def test_embeddings_of_two_embedders_are_not_centred_by_each_other(
    anchor, texts, embedder, make_job, tmp_path
):
    base = _public(anchor, texts, tmp_path / "public", rows_layers=(2, 3), embedder=embedder)
    job = make_job(coordination=True, row_init=str(tmp_path / "wide"), row_centre=True)
    with pytest.raises(ManifestError) as caught:
        _trained_row(job, base, tmp_path / "out")
    assert str(caught.value) == (
        f"row_init: the embedder 'wide' ({embedder_digest(tmp_path / 'wide')[:12]}) gives vectors of 40 numbers, but "
        f"the base's public embedding is 'small' ({embedder_digest(embedder)[:12]}) with 16. Rows of different "
        "embedders cannot be compared: use 'small', or attach public routing artefacts made with --embedder wide."
    )
    without = _public(anchor, texts, tmp_path / "other", rows_layers=(2, 3))
    with pytest.raises(ManifestError) as caught:
        _trained_row(job, without, tmp_path / "out")
    assert str(caught.value) == (
        "row_centre needs the embedding of public text: the base publishes none. Give public text, or attach public "
        "routing artefacts made with --embedder."
    )


def test_two_embedders_in_folders_of_one_name_are_two(anchor, texts, embedder, make_job, tmp_path):
    """And one embedder under two names is one: what counts are its weights and its tokenizer."""
    base = _public(anchor, texts, tmp_path / "public", rows_layers=(2, 3), embedder=embedder)
    settings = {"coordination": True, "held_out": 0, "steps": 1, "row_centre": True}
    renamed = shutil.copytree(embedder, tmp_path / "all-small")
    _, artifacts, _ = _trained_row(make_job(**settings, row_init=str(renamed)), base, tmp_path / "one")
    found = artifacts.info.embedding
    assert (found.model, found.digest) == ("all-small", base.routing_info.embedding.digest)
    namesake = shutil.copytree(embedder, tmp_path / "elsewhere" / "small")
    (namesake / "tokenizer.json").write_text("{}")
    with pytest.raises(ManifestError) as caught:
        _trained_row(make_job(**settings, row_init=str(namesake)), base, tmp_path / "two")
    assert str(caught.value) == (
        f"row_init: the embedder 'small' ({embedder_digest(namesake)[:12]}) gives vectors of 16 numbers, but the "
        f"base's public embedding is 'small' ({embedder_digest(embedder)[:12]}) with 16. Rows of different embedders "
        "cannot be compared: use 'small', or attach public routing artefacts made with --embedder small."
    )


@pytest.mark.parametrize(
    ("at_embedding", "shown"),
    [
        (True, ("sentence-transformer", "anchor", "with")),
        (False, ("anchor", "sentence-transformer", "without")),
    ],
)
def test_rows_that_cannot_stand_beside_the_public_ones_are_not_trained(
    at_embedding, shown, anchor, texts, embedder, make_job, tmp_path
):
    base = _public(
        anchor, texts, tmp_path / "public", rows_layers=(2, 3), embedder=None if at_embedding else embedder
    )
    job = make_job(coordination=True, row_init=str(embedder) if at_embedding else "anchor")
    with pytest.raises(ManifestError) as caught:
        _trained_row(job, base, tmp_path / "out")
    own, public, word = shown
    assert str(caught.value) == (
        f"row_init: rows that start at '{own}' cannot be compared with the base's public rows, which start at "
        f"'{public}'. Choose the row_init that they were made with, or attach public rows made {word} --embedder."
    )
    assert caught.value.exit_code == 2


def test_rows_centred_beside_public_rows_of_other_coordinates_say_so(
    anchor, texts, embedder, make_job, tmp_path
):
    base = _public(anchor, texts, tmp_path / "public", rows_layers=(2, 3))
    settings = {"coordination": True, "held_out": 0, "steps": 1, "row_centre": True}
    job = make_job(**settings, row_init=str(embedder), public=str(texts["public"]))
    _, artifacts, _ = _trained_row(job, base, tmp_path / "out")
    assert artifacts.info.rows.init == "sentence-transformer-centred"


def test_the_digest_of_rows_follows_layers_and_values():
    rows = {2: torch.ones(4), 1: torch.zeros(4)}
    assert rows_digest(rows) == rows_digest({1: torch.zeros(4), 2: torch.ones(4)})
    assert rows_digest(rows) != rows_digest({1: torch.ones(4), 2: torch.zeros(4)})
    assert rows_digest(rows) != rows_digest({2: torch.ones(4)})
