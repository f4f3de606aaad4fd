"""What routing may look at, what it must return, and whether it can be trained."""

from __future__ import annotations

from typing import Any

import torch

from composer.loading import load
from composer.routing.router import Router
from composer.routing.scorers import SCORERS
from composer.trace import RoutingTrace

TOLERANCE = 1e-5
CUT = 15
"""Positions before this one must not notice what stands at or after it."""


def _changed(ids: torch.Tensor) -> torch.Tensor:
    later = ids.clone()
    later[:, CUT:] = ids[:, CUT:].flip(0).flip(1)
    return later


def test_u3_no_gradient_flows_from_later_positions(model: Any, ids: torch.Tensor) -> None:
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds, use_cache=False).logits[:, :CUT].square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[:, CUT:].abs().max() == 0
    assert (embeds.grad[:, :CUT].abs().amax(-1) > 0).all()


def test_u3_later_tokens_change_nothing_before_them(model: Any, ids: torch.Tensor) -> None:
    """The choices at the first routed layer are equal bit for bit; sums over other groups of tokens are not."""
    runs = []
    for tokens in (ids, _changed(ids)):
        with RoutingTrace(model, keep=True) as trace, torch.inference_mode():
            logits = model(tokens, use_cache=False).logits
        decision = trace.decisions[min(trace.decisions)][0][0]
        shape = (*ids.shape, -1)
        runs.append((logits, *(t.view(shape)[:, :CUT] for t in (decision.indices, decision.weights))))
    (before, indices, weights), (after, other_indices, other_weights) = runs
    assert torch.equal(indices, other_indices)
    assert torch.equal(weights, other_weights)
    torch.testing.assert_close(before[:, :CUT], after[:, :CUT], rtol=0, atol=TOLERANCE)
    assert (before[:, CUT:] - after[:, CUT:]).abs().max() > 100 * TOLERANCE


def test_u3_bit_for_bit_where_every_expert_sees_every_token(
    pico: Any, same_shapes: Any, ids: torch.Tensor
) -> None:
    """With all experts chosen, the products have the same shapes whatever the tokens are."""
    model = pico.loaded(**{**same_shapes.settings, "top_k": 4})
    with torch.inference_mode():
        before, after = (model(tokens, use_cache=False).logits for tokens in (ids, _changed(ids)))
    assert torch.equal(before[:, :CUT], after[:, :CUT])


def test_u4_weights(pico: Any, case: Any, model: Any, ids: torch.Tensor) -> None:
    opt_out = [set(), {"acme"}, {"bob", "zoe"}, set(pico.owners)]
    with RoutingTrace(model, keep=True) as trace, torch.inference_mode():
        model(ids, opt_out=opt_out)
    assert trace.decisions
    for decisions in trace.decisions.values():
        decision, _ = decisions[0]
        indices, weights = decision.indices, decision.weights
        used = indices >= 0
        assert (weights >= 0).all()
        assert (weights[~used] == 0).all()
        assert used[:, 0].all(), "every token has an expert"
        assert (indices <= len(model.expert_names)).all()
        distinct = torch.where(used, indices, -1 - torch.arange(indices.shape[1]))
        assert all(len(set(row)) == len(row) for row in distinct.tolist()), "no expert twice"
        assert (used.sum(-1) <= case.router.get("top_k", 2)).all()
        mass = weights.sum(-1)
        if case.router.get("normalize", True):
            torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=1e-6)
        else:
            assert (mass <= 1 + 1e-6).all()
        by_row = indices.view(len(ids), -1)
        for row, owners in enumerate(opt_out):
            left = {
                0,
                *(i for i, owner in enumerate(model.owners_of_experts, start=1) if owner not in owners),
            }
            assert set(by_row[row].tolist()) <= left | {-1}


def test_u5_the_loss_reaches_every_trainable_router(pico: Any, case: Any, ids: torch.Tensor) -> None:
    """A normalised choice of one has weight 1 whatever its logit, so it cannot be trained: it takes two."""
    router = {**case.router, "top_k": max(2, case.router.get("top_k", 2))}
    model = load(pico.composed(**{**case.settings, **router}))
    routers = [module for module in model.modules() if isinstance(module, Router)]
    parameters = [parameter for router in routers for parameter in router.parameters()]
    if not SCORERS.load(case.scorer).trainable:
        assert parameters == []
        return
    assert len(parameters) >= len(routers) > 0
    for parameter in parameters:
        parameter.requires_grad_()
    model(ids, labels=ids).loss.backward()
    for parameter in parameters:
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0


def test_f6_an_absent_owner_gets_no_gradient(pico: Any, case: Any, ids: torch.Tensor) -> None:
    from composer.layers.moe import MoELayer

    model = load(pico.composed(**case.settings))
    modules = [module for module in model.modules() if isinstance(module, MoELayer | Router)]
    for module in modules:
        module.requires_grad_()
    owner = case.absent[0]
    model(ids, labels=ids, opt_out={owner}).loss.backward()
    expert = 1 + model.owners_of_experts.index(owner)
    name = model.expert_names[expert - 1]
    theirs = others = 0
    for layer in (module for module in modules if isinstance(module, MoELayer)):
        for local, number in enumerate(layer.present, start=1):
            grads = _gradients(layer.experts, local)
            if number == expert:
                assert all(grad is None or (grad == 0).all() for grad in grads), name
                theirs += len(grads)
            else:
                others += sum(grad is not None and bool((grad != 0).any()) for grad in grads)
    assert theirs
    assert others
    for router in (module for module in modules if isinstance(module, Router)):
        for parameter in router.parameters():  # one entry per expert along the first dimension
            position = router.scorer.position.get(expert)
            assert position is None or parameter.grad is None or (parameter.grad[position] == 0).all()


def _gradients(block: Any, local: int) -> list[torch.Tensor | None]:
    """Gradients of one expert's parameters in a block."""
    if hasattr(block, "first_full"):
        if local >= block.first_full:
            return _gradients(block.stacked, local - block.first_full)
        block = block.low_rank
    if hasattr(block, "anchor"):
        return [parameter.grad for parameter in block.experts[local - 1].parameters()]
    return [None if p.grad is None else p.grad[local] for p in block.parameters()]


def test_u6_batch_mates_change_nothing(model: Any, ids: torch.Tensor) -> None:
    with torch.inference_mode():
        together = model(ids).logits
        alone = torch.cat([model(ids[row : row + 1]).logits for row in range(len(ids))])
    torch.testing.assert_close(together, alone, rtol=0, atol=TOLERANCE)


def test_u6_left_padding_changes_nothing(model: Any, ids: torch.Tensor) -> None:
    """Rows of different lengths, in one pass and token by token through the cache."""
    lengths = [24, 20, 13, 17]
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    padded = torch.where(mask.bool(), ids, 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        whole = model(padded, attention_mask=mask, position_ids=positions).logits
        out = model(
            padded[:, :-2], attention_mask=mask[:, :-2], position_ids=positions[:, :-2], use_cache=True
        )
        steps = []
        for at in (22, 23):
            out = model(
                padded[:, at : at + 1],
                attention_mask=mask[:, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=out.past_key_values,
                use_cache=True,
            )
            steps.append(out.logits)
        for row, length in enumerate(lengths):
            alone = model(ids[row : row + 1, -length:]).logits[0]
            torch.testing.assert_close(whole[row, -length:], alone, rtol=0, atol=TOLERANCE)
            torch.testing.assert_close(torch.cat(steps, dim=1)[row], alone[-2:], rtol=0, atol=TOLERANCE)
