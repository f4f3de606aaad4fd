"""The two-expert mixture: its formula, what it freezes, and that a bias never rises above zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipelines.train.coordination import CoordinatedFFN, NegativeBias, attach, twin
from pipelines.train.trainers.ffn import FullLinear
from pipelines.train.trainers.lora import LowRankLinear


class TinyFFN(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 4)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class TinyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module() for _ in range(2)])
        for layer in self.layers:
            layer.mlp = TinyFFN()


@pytest.fixture
def ffn():
    torch.manual_seed(0)
    return TinyFFN().requires_grad_(False)


@pytest.mark.parametrize("form", ["softplus", "clamp"])
def test_the_bias_starts_where_it_is_told(form):
    assert float(NegativeBias(init=-0.3, form=form)().detach()) == pytest.approx(-0.3, abs=1e-6)


@pytest.mark.parametrize("form", ["softplus", "clamp"])
def test_the_bias_cannot_be_pushed_above_zero(form):
    bias = NegativeBias(init=-0.3, form=form)
    optimizer = torch.optim.SGD(bias.parameters(), lr=5.0)
    for _ in range(50):
        optimizer.zero_grad()
        (-bias()).backward()  # rewards a larger bias
        optimizer.step()
    assert -0.1 < float(bias().detach()) <= 0


def test_the_mixture_is_the_papers_formula(ffn):
    own = twin(ffn, linears={"up": nn.Linear(4, 6)})
    bias = NegativeBias(init=-0.5, form="softplus")
    rows = torch.randn(2, 4)
    mixture = CoordinatedFFN(ffn, own=own, public_row=rows[0], own_row=rows[1], bias=bias)
    h = torch.randn(2, 3, 4)
    with torch.no_grad():
        result = mixture(h)
    for b in range(2):
        for t in range(3):
            public, mine = float(rows[0] @ h[b, t]), float(rows[1] @ h[b, t]) - 0.5
            p = 1 / (1 + math.exp(mine - public))
            with torch.no_grad():
                expected = p * ffn(h[b, t]) + (1 - p) * own(h[b, t])
            torch.testing.assert_close(result[b, t], expected)


def test_a_twin_shares_every_tensor_that_is_not_replaced(ffn):
    replaced = nn.Linear(4, 6)
    copy = twin(ffn, linears={"up": replaced})
    assert copy.down is ffn.down
    assert copy.up is replaced
    assert ffn.up is not replaced
    assert isinstance(copy, TinyFFN)


def test_stand_ins_start_as_the_linear_they_stand_for(ffn):
    x = torch.randn(5, 4)
    generator = torch.Generator().manual_seed(0)
    low_rank = LowRankLinear(ffn.up, rank=2, scale=3.0, generator=generator)
    with torch.no_grad():
        assert torch.equal(low_rank(x), ffn.up(x))
        assert torch.equal(FullLinear(ffn.up)(x), ffn.up(x))


def test_nothing_frozen_can_be_reached_by_an_optimizer():
    """F7: shared tensors, the public half and the public row stay bit-intact, whatever the weight decay."""
    torch.manual_seed(0)
    model = TinyModel().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    frozen = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    public_rows = {layer: torch.randn(4) for layer in (0, 1)}
    mixtures = {}

    def combine(layer, public, own):
        bias = NegativeBias(init=-0.1, form="clamp")
        mixtures[layer] = CoordinatedFFN(
            public, own=own, public_row=public_rows[layer], own_row=torch.randn(4), bias=bias
        )
        return mixtures[layer]

    names = {n: [f"layers.{n}.mlp.up", f"layers.{n}.mlp.down"] for n in (0, 1)}
    trained = attach(
        model,
        names,
        wrap=lambda linear: LowRankLinear(linear, rank=2, scale=1.0, generator=generator),
        combine=combine,
    )
    assert sorted(trained) == sorted(name for group in names.values() for name in group)
    reachable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in reachable]
    optimizer = torch.optim.AdamW(reachable, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        x = torch.randn(3, 4)
        for layer in model.layers:
            x = x + layer.mlp(x)
        x.square().mean().backward()
        optimizer.step()
    for layer in (0, 1):
        for role in ("up", "down"):
            for kind in ("weight", "bias"):
                now = getattr(getattr(mixtures[layer].public, role), kind)
                assert torch.equal(now, frozen[f"layers.{layer}.mlp.{role}.{kind}"])
                assert getattr(getattr(mixtures[layer].own, role).base, kind) is now
        assert torch.equal(mixtures[layer].public_row, public_rows[layer])
    moved = [not torch.equal(old, new) for old, new in zip(before, reachable, strict=True)]
    assert len(moved) == 2 * (2 * 2 + 2)
    assert all(moved)


@pytest.mark.parametrize(("weight_decay", "intact"), [(0.0, True), (0.1, False)])
def test_zeroed_gradients_freeze_only_without_weight_decay(weight_decay: float, intact: bool) -> None:
    """F7's negative control: a frozen half inside a trained tensor, as FlexOlmo's released code has it, moves."""
    torch.manual_seed(0)
    rows = nn.Parameter(torch.randn(2, 4))
    before = rows.detach().clone()
    optimizer = torch.optim.AdamW([rows], lr=0.1, weight_decay=weight_decay)
    for _ in range(3):
        optimizer.zero_grad()
        (torch.randn(3, 4) @ rows.T).square().mean().backward()
        assert rows.grad is not None
        rows.grad[0] = 0
        optimizer.step()
    assert torch.equal(rows[0], before[0]) == intact
    assert not torch.equal(rows[1], before[1])
