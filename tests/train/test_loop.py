"""The loop: its plan of batches, its schedule, its checkpoints, and what weight decay reaches."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from experts.errors import TrainingError
from pipelines.train.loop import LoopSettings, learning_rate_at, one_pass, plan_batches, train

SETTINGS = LoopSettings(
    steps=10,
    learning_rate=0.1,
    weight_decay=0.0,
    warmup=2,
    grad_clip=1.0,
    checkpoint_every=3,
    schedule="cosine",
)


def _problem():
    torch.manual_seed(1)
    weight, row = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    data = torch.randn(20, 3)

    def loss_of(windows):
        return (data[windows] @ weight - row.sum()).square().mean()

    plan = plan_batches(steps=10, batch_size=2, own=20, public=0, public_fraction=0, seed=0)
    return weight, row, loss_of, plan


def _run(tmp_path, problem, *, on_step=lambda *_: None, settings=SETTINGS):
    weight, row, loss_of, plan = problem
    return train(
        parameters=[weight],
        undecayed=[row],
        accumulate=one_pass(loss_of),
        plan=plan,
        settings=settings,
        checkpoint=tmp_path / "checkpoint.safetensors",
        on_step=on_step,
    )


def test_each_epoch_visits_every_window_once():
    plan = plan_batches(steps=9, batch_size=4, own=12, public=0, public_fraction=0, seed=0)
    epochs = plan.reshape(3, 12)
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_plan_mixes_public_windows_in():
    plan = plan_batches(steps=500, batch_size=4, own=10, public=5, public_fraction=0.3, seed=0)
    assert (plan >= 10).mean() == pytest.approx(0.3, abs=0.03)
    assert set(plan.flatten()) == set(range(15))
    assert np.array_equal(
        plan, plan_batches(steps=500, batch_size=4, own=10, public=5, public_fraction=0.3, seed=0)
    )


def test_the_learning_rate():
    rates = [learning_rate_at(step, SETTINGS) for step in range(10)]
    assert rates[:2] == [pytest.approx(0.05), pytest.approx(0.1)]
    assert rates[2] == pytest.approx(0.1)
    assert rates == [*rates[:2], *sorted(rates[2:], reverse=True)]
    assert learning_rate_at(10, SETTINGS) == pytest.approx(0.01)
    constant = dataclasses.replace(SETTINGS, schedule="constant")
    assert learning_rate_at(9, constant) == 0.1


@pytest.mark.parametrize("at", [1, 5, 9, 10])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, at):
    whole = _problem()
    (tmp_path / "whole").mkdir()
    uninterrupted = _run(tmp_path / "whole", whole)

    def interrupt(step, loss, seconds):
        if step == at:
            raise KeyboardInterrupt

    cut = _problem()
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, cut, on_step=interrupt)
    steps = []
    again = _problem()
    result = _run(tmp_path, again, on_step=lambda step, loss, seconds: steps.append(step))
    assert result.resumed_from == at
    assert steps == list(range(at + 1, 11))
    assert torch.equal(again[0], whole[0])
    assert torch.equal(again[1], whole[1])
    assert result.loss == uninterrupted.loss


def test_an_interrupt_inside_the_optimizers_step_falls_back_to_the_last_whole_one(tmp_path, monkeypatch):
    whole = _problem()
    (tmp_path / "whole").mkdir()
    _run(tmp_path / "whole", whole)
    step, calls = torch.optim.AdamW.step, []

    def torn(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        calls.append(None)
        if len(calls) == 5:
            raise KeyboardInterrupt  # parameters have moved, the state has not
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", torn)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path, _problem())
    again = _problem()
    assert _run(tmp_path, again).resumed_from == 3
    assert torch.equal(again[0], whole[0])


def test_weight_decay_reaches_only_the_experts_matrices(tmp_path):
    weight, row, _, plan = _problem()
    start = weight.detach().clone(), row.detach().clone()
    _run(
        tmp_path,
        (weight, row, lambda _: (weight.sum() + row.sum()) * 0, plan),
        settings=dataclasses.replace(SETTINGS, weight_decay=0.1),
    )
    assert torch.equal(row, start[1])
    assert not torch.equal(weight, start[0])


def test_a_loss_that_is_not_finite_stops_the_job(tmp_path):
    weight, row, _, plan = _problem()
    with pytest.raises(TrainingError) as caught:
        _run(tmp_path, (weight, row, lambda _: weight.sum() * math.nan, plan))
    assert str(caught.value) == (
        "The loss is nan at step 1 of 10. Lower learning_rate, lengthen warmup or check the data."
    )
    assert caught.value.exit_code == 1
