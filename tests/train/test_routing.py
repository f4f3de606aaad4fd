"""Public artefacts and the starting values of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experts.errors import DataError, TrainingError
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo
from pipelines.train.routing import embedding_rows, public_routing, random_rows, rows_digest
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
    rows, mean = embedding_rows(["a"] * 5, (3, 4), model=tmp_path, hidden_size=hidden)
    np.testing.assert_allclose(mean, vectors.mean(axis=0), rtol=1e-6)
    assert rows[3].shape == (hidden,)
    assert torch.equal(rows[3], rows[4])
    if hidden >= 16:  # an orthonormal map into more dimensions keeps lengths
        assert float(rows[3].norm()) == pytest.approx(float(np.linalg.norm(mean)), rel=1e-5)


def test_the_digest_of_rows_follows_layers_and_values():
    rows = {2: torch.ones(4), 1: torch.zeros(4)}
    assert rows_digest(rows) == rows_digest({1: torch.zeros(4), 2: torch.ones(4)})
    assert rows_digest(rows) != rows_digest({1: torch.ones(4), 2: torch.zeros(4)})
    assert rows_digest(rows) != rows_digest({2: torch.ones(4)})
