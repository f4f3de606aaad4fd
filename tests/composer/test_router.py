"""The router: groups of rows, sliced gates, and controls that show what would go wrong otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from composer.routing.router import Router
from composer.routing.scorers.learned import LearnedScorer
from composer.routing.selectors.topk import TopK
from composer.routing.types import RoutingContext, RoutingDecision, group_rows

D, N = 16, 6


def _rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N + 1, D, generator=generator), -torch.rand(N + 1, generator=generator)


def _router(
    kept: Sequence[int], *, dtype: torch.dtype = torch.float32, context: str = "token", k: int = 3
) -> Router:
    rows, bias = (t[list(kept)].to(dtype) for t in _rows())
    return Router(
        scorer=LearnedScorer(ids=range(len(kept)), rows=rows, bias=bias),
        selector=TopK(top_k=k, normalize=True),
        context=context,  # type: ignore[arg-type]
        num_experts=len(kept) - 1,
    )


def _allowed(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.tensor([[expert in row or expert == 0 for expert in range(N + 1)] for row in rows])


def _states(batch: int = 4, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, 11, D, generator=torch.Generator().manual_seed(1)).to(dtype)


def _route(router: Router, x: torch.Tensor, allowed: torch.Tensor, *, trace: bool = False) -> RoutingDecision:
    context = RoutingContext(hidden_states=x, layer=0, groups=group_rows(allowed))
    decision: RoutingDecision = router(context, trace=trace)
    return decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("context", ["token", "running_mean"])
@pytest.mark.parametrize("kept", [(0, 3), (0, 1, 2, 5), (0, 1, 2, 3, 4, 6)])
def test_f1_a_subset_is_routed_as_if_composed_alone(
    dtype: torch.dtype, context: str, kept: tuple[int, ...]
) -> None:
    x = _states(dtype=dtype)
    everybody = _router(range(N + 1), dtype=dtype, context=context)
    got = _route(everybody, x, _allowed([kept] * 4))
    alone = _route(_router(kept, dtype=dtype, context=context), x, torch.ones(4, len(kept), dtype=torch.bool))
    assert torch.equal(got.indices, torch.tensor(kept)[alone.indices])
    assert torch.equal(got.weights, alone.weights)


def test_f3_masking_after_the_softmax_is_something_else() -> None:
    """A negative control: zeroing an absent expert's share is not leaving it out."""
    x = _states()
    kept = (0, 1, 2, 4, 5, 6)
    got = _route(_router(range(N + 1)), x, _allowed([kept] * 4))
    rows, bias = _rows()
    bias[0] = 0
    shares = (x.flatten(0, 1) @ rows.T + bias).softmax(-1)
    weights, _ = shares.topk(3)
    late = torch.where(torch.isin(shares.topk(3).indices, torch.tensor(kept)), weights, 0.0)
    assert (late - got.weights).abs().max() > 0.05


def test_rows_with_their_own_sets_are_routed_apart() -> None:
    x = _states()
    sets = [(1, 2, 3, 4, 5, 6), (2,), (), (2,)]
    together = _route(_router(range(N + 1)), x, _allowed(sets))
    assert together.has_unused
    assert not together.anchor_only
    indices, weights = (t.view(4, 11, 3) for t in (together.indices, together.weights))
    for row, kept in enumerate(sets):
        alone = _route(_router(range(N + 1)), x[row : row + 1], _allowed([kept]))
        k = alone.indices.shape[1]
        assert k == min(3, len(kept) + 1)
        assert torch.equal(indices[row, :, :k], alone.indices)
        torch.testing.assert_close(weights[row, :, :k], alone.weights)
        assert (indices[row, :, k:] == -1).all()
        assert (weights[row, :, k:] == 0).all()


def test_nobody_allowed_means_the_anchor_and_no_scoring() -> None:
    router = _router(range(N + 1))
    router.scorer.rows.data.fill_(float("nan"))  # type: ignore[union-attr]
    decision = _route(router, _states(), _allowed([()] * 4))
    assert decision.anchor_only
    assert torch.equal(decision.indices, torch.zeros(44, 1, dtype=torch.int64))
    assert torch.equal(decision.weights, torch.ones(44, 1))


def test_a_trace_has_minus_infinity_where_nobody_was_asked() -> None:
    decision = _route(_router(range(N + 1)), _states(), _allowed([(1, 2), (3,), (1, 2), ()]), trace=True)
    assert decision.logits is not None
    asked = decision.logits.view(4, 11, N + 1).isfinite()
    assert torch.equal(asked[:, 0], _allowed([(1, 2), (3,), (1, 2), ()]))


def test_experts_that_are_absent_from_a_layer_are_not_routed_to() -> None:
    rows, bias = _rows()
    router = Router(
        scorer=LearnedScorer(ids=[0, 2, 5], rows=rows[[0, 2, 5]], bias=bias[[0, 2, 5]]),
        selector=TopK(top_k=4),
        context="token",
        num_experts=N,
        present=(2, 5),
    )
    decision = _route(router, _states(), _allowed([(1, 2), (5,), (1, 3), (2, 5)]))
    seen = [set(row.tolist()) for row in decision.indices.view(4, -1)]
    assert seen == [{0, 2, -1}, {0, 5, -1}, {0, -1}, {0, 2, 5}]


def test_groups_partition_the_batch() -> None:
    groups = group_rows(_allowed([(1,), (2, 3), (1,), ()]))
    assert [(g.experts, None if g.rows is None else g.rows.tolist()) for g in groups] == [
        ((0, 1), [0, 2]),
        ((0, 2, 3), [1]),
        ((0,), [3]),
    ]
    assert [(g.experts, g.rows) for g in group_rows(_allowed([(4,), (4,)]))] == [((0, 4), None)]


@pytest.mark.parametrize("weight", [0.25, 0.9])
def test_a_blend_scores_between_the_mean_and_the_token(weight: float) -> None:
    x, allowed = _states(), _allowed([(1, 2, 5)] * 4)
    routers = [
        _router(range(N + 1), context=context) for context in ("running_mean", "token", "running_mean")
    ]
    routers[2].token_weight = weight
    mean, token, blend = (_route(router, x, allowed, trace=True).logits for router in routers)
    assert mean is not None
    assert token is not None
    assert blend is not None
    asked = mean.isfinite()
    torch.testing.assert_close(blend[asked], ((1 - weight) * mean + weight * token)[asked])
    assert (mean - token)[asked].abs().max() > 0.5
