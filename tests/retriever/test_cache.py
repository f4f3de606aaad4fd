"""Kept embeddings: a hit only for the same text, the same allowed experts and the same composition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from composer.loading import load
from composer.retrieval.cache import QueryCache
from experts.errors import UnknownNameError


class Counting:
    """A model that counts the texts it encodes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_query(self, texts: Sequence[str], **options: Any) -> Any:
        self.encoded += len(texts)
        return self.model.encode_query(texts, **options)


def test_r24_what_makes_a_hit(retrievers: Any, texts: list[str]) -> None:
    model, cache = Counting(retrievers.model()), QueryCache()
    sets: list[set[str]] = [set(), {"acme"}, {"bob", "zoe"}, set(retrievers.owners)]
    for opt_out in sets:
        first = cache.encode_query(model, texts, opt_out=opt_out)
        assert np.abs(first - retrievers.model().encode_query(texts, opt_out=opt_out)).max() < 1e-5
        assert np.array_equal(cache.encode_query(model, texts, opt_out=opt_out), first)
    assert (model.encoded, cache.hits, len(cache)) == (4 * len(texts), 4 * len(texts), 4 * len(texts))
    again = cache.encode_query(model, texts[:4], opt_out=sets)
    assert model.encoded == 4 * len(texts)
    assert len({vector.tobytes() for vector in again}) == 4
    assert cache.encode_query(model, []).shape == (0, 32)


def test_r24_another_composition_is_another_key(retrievers: Any, texts: list[str]) -> None:
    """Nobody of acme may answer in either case; but the routers of the two folders are not the same."""
    cache = QueryCache()
    models = [
        Counting(retrievers.model()),
        Counting(retrievers.model(scorer="centroid")),
        Counting(load(retrievers.folder(), opt_out={"acme"})),
    ]
    for model in models:
        found = cache.encode_query(model, texts, opt_out={"acme"})
        assert np.abs(found - model.model.encode_query(texts, opt_out={"acme"})).max() < 1e-5
        assert model.encoded == len(texts)
    with pytest.raises(UnknownNameError, match=r"^Unknown owner 'acne'\. Did you mean 'acme'\?"):
        cache.encode_query(models[0], texts, opt_out={"acne"})


@pytest.mark.parametrize(
    "settings",
    [{"pooling": "cls"}, {"prompts": {"query": "duba "}}, {"max_seq_length": 6}],
    ids=lambda settings: str(*settings),
)
def test_r24_another_base_of_the_same_tensors_is_another_key(
    retrievers: Any, pico: Any, texts: list[str], settings: dict[str, Any]
) -> None:
    """Everybody is left out, so no expert's card tells the bases apart."""
    from registry import Registry

    registry = Registry(pico.scratch("registry"))
    registry.add_base(pico.embedder(**settings), name="embedder")
    raw = pico.write_retriever(pico.scratch("raw"), seed=1, r=2)
    artifacts = pico.retrieval_artifacts(1)
    registry.register(pico.pack_retriever(raw, name="acme/search", artifacts=artifacts, **settings))
    folder = retrievers.compose(retrievers.manifest(["acme/search"]), registry=registry)
    cache, other = QueryCache(), load(folder, opt_out={"acme"})
    alone = load(retrievers.folder(["acme/search"]), opt_out={"acme"})
    tensors = [dict(model[0].model.base.named_parameters()) for model in (alone, other)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    for model in (alone, other):
        found = cache.encode_query(model, texts)
        assert np.abs(found - model.encode_query(texts)).max() < 1e-5
    assert cache.hits == 0
    assert not np.allclose(alone.encode_query(texts), other.encode_query(texts), atol=1e-3), "the control"


def test_the_oldest_make_room(retrievers: Any, texts: list[str]) -> None:
    model, cache = Counting(retrievers.model()), QueryCache(size=2)
    for text in (texts[0], texts[1], texts[0], texts[2], texts[0], texts[1]):
        cache.encode_query(model, [text])
    assert (len(cache), cache.hits, model.encoded) == (2, 2, 4)
