"""The selector's contract: logits over the allowed experts in, chosen positions and their weights out."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

__all__ = ["Selector", "SelectorOptions"]


class SelectorOptions(BaseModel):
    """Settings of a selector beside ``top_k`` and ``normalize``, as ``router.selector_options`` gives them."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Selector(nn.Module):
    """Turns logits into a choice.

    A selector sees the allowed experts only, so whatever it computes is what it would compute had the others
    never been composed; and each token by itself, so rows with different sets may share a call. Weights are
    non-negative; they sum to 1 where ``normalize`` is set. It is made with ``top_k``, ``normalize`` and its options as
    keyword arguments.

    Attributes:
        normalize: Whether the weights of a token sum to 1.
        adaptive: Whether a token may get fewer experts than there are slots; expert layers then look for empty slots
            and compute nothing for them.
        Options: What ``router.selector_options`` may say.
    """

    normalize: bool
    adaptive: bool = False
    Options: ClassVar[type[SelectorOptions]] = SelectorOptions

    @abstractmethod
    def forward(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts.

        Args:
            logits: ``(tokens, n)``, one column per allowed expert.

        Returns:
            Positions among the ``n`` columns, int64 ``(tokens, k)``, and weights, float32 ``(tokens, k)``, with
            ``k <= n``. Where the selector is adaptive, the last positions of a row may be
            `composer.routing.types.UNUSED`, with weight 0; the first one never is.
        """
