"""An arm of a comparison: given windows, their logits. Knows how it is asked; each baseline knows its answer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from torch import Tensor, nn

from pipelines.evaluate import DomainWindows, Evaluation, Progress, measure

if TYPE_CHECKING:
    from pipelines.baselines.anchor import Anchor

__all__ = ["Arm", "DenseArm", "score"]


class Arm(ABC):
    """One model, or one way to use several; a `pipelines.evaluate.Run`."""

    def __call__(self, domain: str, part: slice, ids: Tensor) -> Tensor:
        """Logits of some windows of a domain; see `pipelines.evaluate.Run`."""
        return self.logits(ids, domain=domain)

    @abstractmethod
    def logits(self, ids: Tensor, *, domain: str | None = None) -> Tensor:
        """Predict the next token at every position.

        Args:
            ids: int64 ``(batch, length)``, without padding.
            domain: Where the windows come from; only the oracle looks at it.

        Returns:
            ``(batch, length, vocabulary)``, any float dtype, on the anchor's device. A softmax over them gives the
            arm's probabilities.
        """


@final
class DenseArm(Arm):
    """The anchor with other tensors in some places: one dense model.

    Args:
        anchor: The anchor.
        tensors: By name; none: the anchor itself.
    """

    def __init__(self, anchor: Anchor, tensors: Mapping[str, Tensor]) -> None:
        self.anchor = anchor
        self.tensors = tensors

    def logits(self, ids: Tensor, *, domain: str | None = None) -> Tensor:
        """See `Arm.logits`; in the anchor's dtype."""
        return self.anchor.logits(ids, self.tensors)


def score(
    arm: Arm,
    windows: Mapping[str, DomainWindows],
    *,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure an arm on windows that `pipelines.evaluate.prepare` cut.

    Args:
        arm: What `pipelines.baselines.make_baseline` returned.
        windows: By domain.
        batch_size: Windows run at once.
        progress: Told how many tokens are done.
    """
    return measure(nn.Identity(), windows, batch_size=batch_size, run=arm, progress=progress)
