"""Learned rows are refused where what they were trained beside is not what they would be composed beside."""

from __future__ import annotations

import pytest

from composer.routing.scorers.learned import LearnedScorer
from experts.routing_artifacts import EmbeddingInfo, RoutingInfo, RowsInfo


def _info(digest: str | None, *, embedder: tuple[str, int] | None = None) -> RoutingInfo:
    return RoutingInfo(
        rows=RowsInfo(layers=(1, 2), has_bias=False, public_digest=digest, init="x"),
        embedding=EmbeddingInfo(model=embedder[0], dim=embedder[1]) if embedder else None,
    )


def _problems(public: RoutingInfo, *experts: RoutingInfo) -> list[str]:
    named = {f"o{n}/x": (info, (1, 2)) for n, info in enumerate(experts)}
    return LearnedScorer.problems(public=public, experts=named, layer=None)


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("public", "experts", "expected"),
    [
        (A, (A, A), []),
        (None, (A, A), []),  # artefacts from before the digest was published
        (A, (None, None), []),
        (
            A,
            (B, B),
            [
                "the experts' rows were trained beside other public rows (bbbbbbbbbbbb) than the base publishes "
                "(aaaaaaaaaaaa)"
            ],
        ),
        (
            A,
            (A, B),
            ["the experts' rows were trained beside different public rows (aaaaaaaaaaaa, bbbbbbbbbbbb)"],
        ),
    ],
)
def test_the_frozen_public_row_must_be_one(public, experts, expected) -> None:
    assert _problems(_info(public), *map(_info, experts)) == expected


def test_domain_embeddings_of_different_embedders() -> None:
    small, wide = ("small", 16), ("wide", 40)
    assert _problems(_info(A, embedder=small), _info(A, embedder=small), _info(A)) == []
    assert _problems(_info(A), _info(A, embedder=small), _info(A, embedder=small)) == []
    assert _problems(_info(A, embedder=small), _info(A, embedder=small), _info(A, embedder=wide)) == [
        "the domain embeddings were made by different embedders (the base: 'small' (16), o0/x: 'small' (16), o1/x: "
        "'wide' (40))"
    ]
    assert _problems(_info(A), _info(A, embedder=small), _info(A, embedder=wide)) == [
        "the domain embeddings were made by different embedders (o0/x: 'small' (16), o1/x: 'wide' (40))"
    ]
