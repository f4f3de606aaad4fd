"""What is kept per allowed set: bounded, made once, usable in calls that train."""

from __future__ import annotations

import torch

from composer.routing.recent import Recent


def test_the_latest_values_are_kept() -> None:
    made: list[int] = []
    recent: Recent[int] = Recent(2)

    def get(key: int) -> int:
        return recent.get(key, lambda: made.append(key) or key * 10)

    assert [get(key) for key in (1, 2, 1, 3, 3, 1)] == [10, 20, 10, 30, 30, 10]
    assert made == [1, 2, 3, 1]
    assert len(recent) == 2
    recent.clear()
    assert len(recent) == 0


def test_a_tensor_made_in_inference_mode_may_be_trained_with() -> None:
    recent: Recent[torch.Tensor] = Recent()
    with torch.inference_mode():
        index = recent.get("key", lambda: torch.tensor([1, 0]))
    assert not index.is_inference()
    weight = torch.ones(2, requires_grad=True)
    weight[index].sum().backward()
    assert weight.grad is not None
