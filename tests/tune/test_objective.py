"""The losses and their gradients, against slow ones that go token by token."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import composer
from composer.routing.losses import load_balancing_loss, router_z_loss, tokens_per_expert
from pipelines.tune.job import LoadBalancing
from pipelines.tune.objective import Objective, routing_decisions


def _slow_balance(logits: Tensor, chosen: list[list[int]], over: list[list[int]]) -> Tensor:
    """``N sum f P`` with Python's loops; ``over``: the choices that f is counted on."""
    n = logits.shape[1]
    there = [i for i in range(n) if math.isfinite(float(logits[0, i].detach()))]
    shares = [sum(row.count(i) for row in over) / sum(map(len, over)) for i in range(n)]
    total = logits.new_zeros(())
    for i in there:
        mass = logits.new_zeros(())
        for row in logits:
            mass = mass + row[i].exp() / sum(row[j].exp() for j in there)
        total = total + shares[i] * mass / len(logits)
    return len(there) * total


@pytest.mark.parametrize("absent", [None, 2])
def test_load_balancing_and_its_gradient(absent: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(7, 4, generator=generator, dtype=torch.float64)
    if absent is not None:
        values[:, absent] = -math.inf
    logits, slow = values.clone().requires_grad_(), values.clone().requires_grad_()
    indices = logits.detach().topk(2, dim=-1).indices
    counts = tokens_per_expert(indices, num_experts=4)
    loss = load_balancing_loss(logits, counts)
    expected = _slow_balance(slow, indices.tolist(), indices.tolist())
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad, slow.grad.nan_to_num(0.0), atol=1e-7, rtol=1e-5)
    assert logits.grad.abs().sum() > 0


def test_load_balancing_is_one_where_experts_are_used_alike_and_n_where_one_does_everything() -> None:
    even = torch.zeros(6, 3)
    assert float(load_balancing_loss(even, torch.tensor([2.0, 2.0, 2.0]))) == pytest.approx(1.0)
    one = torch.tensor([[50.0, 0.0, 0.0]]).expand(6, -1)
    assert float(load_balancing_loss(one, torch.tensor([6.0, 0.0, 0.0]))) == pytest.approx(3.0)


def test_empty_slots_are_no_choice() -> None:
    assert tokens_per_expert(torch.tensor([[1, -1], [0, 1]]), num_experts=3).tolist() == [1.0, 2.0, 0.0]


def test_the_z_loss() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), -math.inf]])
    assert float(router_z_loss(logits)) == pytest.approx((math.log(2) ** 2 + math.log(3) ** 2) / 2)


@pytest.fixture(scope="module")
def model(pico: Any) -> Any:
    loaded = composer.load(pico.composed("stacked", scorer="learned", context="token", top_k=2))
    for name, parameter in loaded.named_parameters():
        parameter.requires_grad_("rows" in name)
    return loaded


def _gradients(model: Any, ids: Tensor, **settings: Any) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    defaults: dict[str, Any] = {"load_balancing": LoadBalancing(weight=0.5), "router_z_loss": 0.25}
    objective = Objective(
        model, ids, parameters=[p for p in model.parameters() if p.requires_grad], **{**defaults, **settings}
    )
    loss = objective.accumulate(torch.arange(len(ids)))
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _reference(model: Any, ids: Tensor, *, micro_batch: int, over: str) -> tuple[float, dict[str, Tensor]]:
    """The paper's formula, micro-batch by micro-batch, with the slow balance."""
    model.zero_grad(set_to_none=True)
    seen: dict[int, list[list[int]]] = {}
    total = 0.0
    for part in ids.split(micro_batch):
        with routing_decisions() as decisions:
            logits = model(input_ids=part, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1))
        for layer, decision in decisions:
            chosen = decision.indices.tolist()
            seen[layer] = seen.get(layer, []) + chosen
            loss = loss + 0.5 * _slow_balance(
                decision.logits, chosen, seen[layer] if over == "global_batch" else chosen
            )
            loss = loss + 0.25 * decision.logits.logsumexp(-1).square().mean()
        loss = loss * len(part) / len(ids)
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("over", ["global_batch", "micro_batch"])
def test_a_step_is_the_papers_formula(pico: Any, model: Any, over: Any) -> None:
    ids = pico.prompts(rows=4, length=8)
    loss, gradients = _gradients(
        model, ids, micro_batch=2, load_balancing=LoadBalancing(weight=0.5, over=over)
    )
    expected, slow = _reference(model, ids, micro_batch=2, over=over)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == slow.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, slow[name], atol=1e-6, rtol=1e-4)


def test_balance_over_the_batch_differs_from_balance_over_micro_batches(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=4, length=8)
    balances = [LoadBalancing(weight=0.5, over=over) for over in ("global_batch", "micro_batch")]
    apart = [_gradients(model, ids, micro_batch=1, load_balancing=balance)[1] for balance in balances]
    assert any(not torch.allclose(apart[0][name], apart[1][name]) for name in apart[0])
    whole = [_gradients(model, ids, load_balancing=balance)[1] for balance in balances]
    assert all(torch.equal(whole[0][name], whole[1][name]) for name in whole[0])


def test_micro_batches_add_up_to_the_batch(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=4, length=8)
    none = {"load_balancing": LoadBalancing(weight=0.0), "router_z_loss": 0.1}
    whole, parts = _gradients(model, ids, **none), _gradients(model, ids, micro_batch=1, **none)
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(gradient, parts[1][name], atol=1e-6, rtol=1e-4)


def test_bfloat16_products_change_little(pico: Any, model: Any) -> None:
    ids = pico.prompts(rows=2, length=8)
    exact, low = _gradients(model, ids), _gradients(model, ids, dtype=torch.bfloat16)
    assert exact[0] != low[0]
    assert exact[0] == pytest.approx(low[0], rel=2e-2)
