"""The oracle: each domain's windows go to that domain's expert, which no router can know beforehand.

Text that is nobody's goes to the anchor. Knows domains' names only; what whole-model routing can reach at best.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, final

from torch import Tensor

from experts.errors import DataError
from pipelines.baselines.arm import Arm
from pipelines.baselines.dense import DenseTensors, open_dense

if TYPE_CHECKING:
    from pipelines.baselines.anchor import Anchor
    from pipelines.baselines.context import BaselineContext

__all__ = ["Oracle", "make"]


@final
class Oracle(Arm):
    """Each domain with its own expert. Only the expert in use is held in memory.

    Args:
        anchor: The anchor, for every other domain.
        experts: By domain.
    """

    def __init__(self, anchor: Anchor, experts: Mapping[str, DenseTensors]) -> None:
        self.anchor = anchor
        self.experts = experts
        self._held: tuple[str, dict[str, Tensor]] = ("", {})

    def logits(self, ids: Tensor, *, domain: str | None = None) -> Tensor:
        """See `Arm.logits`.

        Raises:
            DataError: ``domain`` is not given.
        """
        if domain is None:
            raise DataError("The oracle has to be told the domain of the text. Give domain=...")
        if domain not in self.experts:
            return self.anchor.logits(ids)
        if self._held[0] != domain:
            self._held = (domain, dict(self.experts[domain]))
        return self.anchor.logits(ids, self._held[1])


def make(context: BaselineContext) -> Oracle:
    """Make the oracle of all experts."""
    return Oracle(context.anchor(), open_dense(context))
