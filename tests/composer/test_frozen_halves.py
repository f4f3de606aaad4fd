"""Learned rows are refused where what they were trained beside is not what they would be composed beside."""

from __future__ import annotations

import pytest

from composer.routing.scorers.learned import LearnedScorer
from experts.routing_artifacts import EmbeddingInfo, RoutingInfo, RowsInfo


def _info(digest: str, *, embedder: tuple[str, str, int] | None = None, init: str = "x") -> RoutingInfo:
    return RoutingInfo(
        rows=RowsInfo(layers=(1, 2), has_bias=False, public_digest=digest, init=init),
        embedding=EmbeddingInfo(model=embedder[0], digest=embedder[1] * 64, dim=embedder[2])
        if embedder
        else None,
    )


def _problems(public: RoutingInfo, *experts: RoutingInfo) -> list[str]:
    named = {f"o{n}/x": (info, (1, 2)) for n, info in enumerate(experts)}
    return LearnedScorer.problems(public=public, experts=named, layer=None)


A, B = "a" * 64, "b" * 64


@pytest.mark.parametrize(
    ("public", "experts", "expected"),
    [
        (A, (A, A), []),
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
    """An embedder is its digest: a folder's name neither makes two of one nor one of two."""
    small, renamed, other = ("small", "c", 16), ("all-small", "c", 16), ("small", "d", 16)
    assert _problems(_info(A, embedder=small), _info(A, embedder=renamed), _info(A)) == []
    assert _problems(_info(A), _info(A, embedder=small), _info(A, embedder=renamed)) == []
    assert _problems(_info(A, embedder=small), _info(A, embedder=renamed), _info(A, embedder=other)) == [
        "the domain embeddings were made by different embedders (the base: 'small' (16, cccccccccccc), o0/x: "
        "'all-small' (16, cccccccccccc), o1/x: 'small' (16, dddddddddddd)); one embedder must make them all: train "
        "with the same row_init"
    ]
    assert _problems(_info(A), _info(A, embedder=small), _info(A, embedder=("small", "c", 8))) == [
        "the domain embeddings were made by different embedders (o0/x: 'small' (16, cccccccccccc), o1/x: 'small' (8, "
        "cccccccccccc)); one embedder must make them all: train with the same row_init"
    ]


EMBEDDED, CENTRED = "sentence-transformer", "sentence-transformer-centred"


@pytest.mark.parametrize(
    ("public", "experts", "shown"),
    [
        ("anchor", ("anchor", "anchor"), None),
        ("anchor", ("random", "random"), None),  # the ablation without a start
        ("anchor", (CENTRED, CENTRED), None),  # by what sets them apart from the public row
        ("imported", ("imported", "anchor"), None),  # nobody knows where imported rows started
        (
            "anchor",
            (EMBEDDED, "anchor"),
            "the base: 'anchor', o0/x: 'sentence-transformer', o1/x: 'anchor'",
        ),
        (
            "anchor",
            (EMBEDDED, EMBEDDED),
            "the base: 'anchor', o0/x: 'sentence-transformer', o1/x: 'sentence-transformer'",
        ),
        ("anchor", ("anchor", "random"), "the base: 'anchor', o0/x: 'anchor', o1/x: 'random'"),
        ("imported", (EMBEDDED, "anchor"), "o0/x: 'sentence-transformer', o1/x: 'anchor'"),
    ],
)
def test_rows_must_start_alike(public, experts, shown) -> None:
    found = _problems(_info(A, init=public), *(_info(A, init=init) for init in experts))
    assert found == (
        []
        if shown is None
        else [
            f"the router rows start at different things ({shown}); all must start alike, the base's public rows too: "
            "train them with one row_init, and attach public rows made with it (with --embedder, or without)"
        ]
    )
