"""Top-p selection against its definition, and that nothing is computed for an empty slot."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from composer.blocks.low_rank import LowRankFFN
from composer.layers.moe import MoELayer
from composer.loading import load
from composer.routing.router import Router
from composer.routing.scorers.learned import LearnedScorer
from composer.routing.selectors.topk import TopK
from composer.routing.selectors.topp import TopP
from composer.routing.types import UNUSED, RoutingContext, RoutingDecision, group_rows
from composer.trace import RoutingTrace

_logits = st.lists(st.integers(-64, 64).map(lambda n: n / 8), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(logits=_logits, k=st.integers(1, 8), p=st.floats(0.05, 0.99), normalize=st.booleans())
def test_the_smallest_set_with_the_mass(logits: list[float], k: int, p: float, normalize: bool) -> None:
    positions, weights = TopP(top_k=k, top_p=p, normalize=normalize)(torch.tensor([logits]))
    exponentials = [math.exp(x - max(logits)) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    shares = [(exponentials[i] / sum(exponentials), i) for i in order]
    sizes = [n for n in range(1, len(shares) + 1) if math.fsum(s for s, _ in shares[:n]) >= p - 1e-6]
    smallest = min(min(sizes), k)
    chosen = [i for i in positions[0].tolist() if i != UNUSED]
    if any(abs(math.fsum(s for s, _ in shares[:n]) - p) < 1e-5 for n in range(1, len(shares))):
        return  # a mass on the boundary may fall on either side
    assert chosen == [i for _, i in shares[:smallest]]
    assert positions[0].tolist() == chosen + [UNUSED] * (positions.shape[1] - len(chosen))
    kept = [s for s, _ in shares[:smallest]]
    expected = [s / sum(kept) for s in kept] if normalize else kept
    assert weights[0, : len(kept)].tolist() == pytest.approx(expected, abs=1e-5)
    assert weights[0, len(kept) :].tolist() == [0.0] * (positions.shape[1] - len(kept))


def test_equal_logits_go_to_the_lower_id_whatever_stands_beside_them() -> None:
    for columns in range(4, 40):
        positions, weights = TopP(top_k=columns, top_p=2.5 / columns)(torch.zeros(5, columns))
        assert positions[:, :3].tolist() == [[0, 1, 2]] * 5
        assert (positions[:, 3:] == UNUSED).all()
        torch.testing.assert_close(weights[:, :3], torch.full((5, 3), 1 / 3))


@pytest.mark.parametrize("normalize", [True, False])
def test_all_of_the_mass_is_top_k(normalize: bool) -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    for got, expected in zip(
        TopP(top_k=3, top_p=1.0, normalize=normalize)(logits),
        TopK(top_k=3, normalize=normalize)(logits),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_gradients_of_dropped_experts_are_finite() -> None:
    logits = torch.tensor([[4.0, 0.0, -1.0], [0.1, 0.0, -0.1]]).requires_grad_()
    TopP(top_k=3, top_p=0.7)(logits)[1][:, 0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0].tolist() == [0.0, 0.0, 0.0], "a choice of one has weight 1 whatever its logit"
    assert (logits.grad[1] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"top_k": 0}, "top_k must be at least 1, got 0."),
        ({"top_k": 2, "top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0."),
        ({"top_k": 2, "top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5."),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        TopP(**arguments)


# In the router

D, N = 16, 5


def _router(*, present: tuple[int, ...] | None = None) -> Router:
    rows = torch.randn(N + 1, D, generator=torch.Generator().manual_seed(0))
    ids = tuple(range(N + 1)) if present is None else (0, *present)
    return Router(
        scorer=LearnedScorer(ids=ids, rows=rows[list(ids)]).requires_grad_(False),
        selector=TopP(top_k=4, top_p=0.8),
        context="token",
        num_experts=N,
        present=present,
    )


def _route(router: Router, x: torch.Tensor, sets: list[tuple[int, ...]]) -> RoutingDecision:
    allowed = torch.tensor([[expert in row or expert == 0 for expert in range(N + 1)] for row in sets])
    context = RoutingContext(hidden_states=x, layer=0, groups=group_rows(allowed))
    decision: RoutingDecision = router(context)
    return decision


@pytest.mark.parametrize(
    "sets",
    [
        [(1, 2, 3, 4, 5)] * 3,
        [(1, 3, 5)] * 3,
        [(1, 3, 5), (2, 3, 4), (1, 2, 5)],
        [(1, 2, 3, 4), (3,), ()],
    ],
    ids=["everybody", "one subset", "subsets of one size", "subsets of several sizes"],
)
@pytest.mark.parametrize("present", [None, (1, 2, 3)])
def test_every_row_is_routed_as_if_alone(
    sets: list[tuple[int, ...]], present: tuple[int, ...] | None
) -> None:
    x = torch.randn(3, 7, D, generator=torch.Generator().manual_seed(1))
    router = _router(present=present)
    together = _route(router, x, sets)
    assert together.has_unused
    assert (together.indices == UNUSED).any()
    used = together.indices != UNUSED
    assert (used[:, :-1] >= used[:, 1:]).all(), "empty slots stand at the end"
    assert (together.weights[~used] == 0).all()
    torch.testing.assert_close(together.weights.sum(-1), torch.ones(21))
    for row, kept in enumerate(sets):
        alone = _route(router, x[row : row + 1], [kept])
        here = slice(7 * row, 7 * row + 7)
        k = alone.indices.shape[1]
        assert torch.equal(together.indices[here, :k], alone.indices)
        assert (together.indices[here, k:] == UNUSED).all()
        torch.testing.assert_close(together.weights[here, :k], alone.weights)
        may = {0, UNUSED, *(kept if present is None else set(kept) & set(present))}
        assert set(together.indices[here].flatten().tolist()) <= may


# In a model


@pytest.mark.parametrize("block", ["low_rank", "stacked", "mixed"])
def test_an_empty_slot_is_no_product_with_zero(pico: Any, block: str) -> None:
    """With everybody allowed and one owner full of NaN, only tokens that chose them may notice."""
    settings: dict[str, Any] = {"scorer": "learned", "context": "token", "selector": "topp", "top_k": 4}
    folder = pico.composed(block, **settings, selector_options={"top_p": 0.5})
    model, ids = load(folder), pico.prompts()
    last = max(m.layer for m in model.modules() if isinstance(m, MoELayer))
    with RoutingTrace(model, keep=True) as trace, torch.inference_mode():
        clean = model(ids).logits.flatten(0, 1)
    indices = trace.decisions[last][0][0].indices
    assert (indices == UNUSED).any()
    layer = next(m for m in model.modules() if isinstance(m, MoELayer) and m.layer == last)
    expert = max(layer.present)
    _fill_with_nan(layer.experts, 1 + layer.present.index(expert))
    with torch.inference_mode():
        got = model(ids).logits.flatten(0, 1)
    met = (indices == expert).any(-1)
    assert 0 < int(met.sum()) < len(met)
    assert got[met].isnan().all()
    torch.testing.assert_close(got[~met], clean[~met])


def _fill_with_nan(block: Any, local: int) -> None:
    if hasattr(block, "first_full"):
        block, local = (
            (block.stacked, local - block.first_full)
            if local >= block.first_full
            else (block.low_rank, local)
        )
    if isinstance(block, LowRankFFN):
        for parameter in block.experts[local - 1].parameters():
            parameter.data.fill_(float("nan"))
    else:
        for parameter in block.parameters():
            parameter.data[local] = float("nan")


def test_fewer_experts_where_one_is_sure(pico: Any) -> None:
    """The lower the mass asked for, the fewer experts a token meets; top_k bounds them."""
    used = []
    for top_p in (0.3, 0.9, 1.0):
        model = pico.loaded(selector="topp", top_k=3, selector_options={"top_p": top_p})
        with RoutingTrace(model, keep=True) as trace, torch.inference_mode():
            model(pico.prompts())
        (decisions,) = trace.decisions.values()
        used.append(float((decisions[0][0].indices >= 0).sum(-1).float().mean()))
    assert 1.0 <= used[0] < used[1] < used[2] == 3.0
