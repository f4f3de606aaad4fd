"""The router rows of a composition, layer by layer: tuned, published, drawn, or made of prompts.

Rows made of prompts need the composed model, which is loaded for them when they are written. Knows scorers by what
their rows come from; knows nothing of stock names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from composer.export.exactness import Rows
from composer.export.seats import Seat
from composer.export.tensors import FLOATS, floats
from composer.export.tuned import TunedTensors
from composer.members import Members

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["RouterRows"]


class RouterRows:
    """Rows as the loaded composition has them.

    Args:
        members: The experts that are exported.
        published: Rows of owners, and of the public, by id.
        tuned: What was tuned.
        dtype: Of the model, in safetensors' spelling.
        left_out: Owners that are not exported.
    """

    def __init__(
        self,
        members: Members,
        published: Mapping[int, Rows],
        tuned: TunedTensors,
        *,
        dtype: str,
        left_out: Collection[str],
    ) -> None:
        self.members = members
        self.published = published
        self.tuned = tuned
        self.dtype = dtype
        self.left_out = left_out

    def of(self, layer: int, present: Sequence[Seat]) -> NDArray[np.float32]:
        """Return a layer's rows, ``(len(present), d)``, in the order of ``present``."""
        import numpy as np

        stored = self.tuned.rows(layer)
        if stored is not None:
            first = iter(floats(stored))
            later = self.tuned.grown
            return np.stack(
                [
                    floats(self.tuned.later_row(layer, seat.name)) if seat.name in later else next(first)
                    for seat in present
                ]
            )
        match self.members.lock.router.scorer:
            case "learned":
                return np.stack([self.published[seat.id].weights[layer] for seat in present])
            case "random":
                return self._drawn(layer, present)
            case _:
                return self._loaded[layer]

    def _drawn(self, layer: int, present: Sequence[Seat]) -> NDArray[np.float32]:
        import torch

        from composer.recipes.routers import NOTHING
        from composer.routing.scorers.base import ScorerInputs
        from composer.routing.scorers.random import RandomScorer

        inputs = ScorerInputs(
            public=NOTHING,
            experts={},
            layer=layer,
            dtype=getattr(torch, FLOATS[self.dtype]),
            device=torch.device("cpu"),
            hidden_size=self.members.description.hidden_size,
            names={seat.id: seat.name for seat in present},
        )
        options = RandomScorer.Options(**self.members.lock.router.options)
        return RandomScorer.make(inputs, options).rows.detach().float().numpy()

    @cached_property
    def _loaded(self) -> dict[int, NDArray[np.float32]]:
        """The rows of the loaded model, which is let go again."""
        from composer.layers.moe import MoELayer
        from composer.loading import load

        model: Any = load(self.members.folder, opt_out=self.left_out)
        routers: dict[int, Any] = {m.layer: m.router for m in model.modules() if isinstance(m, MoELayer)}
        return {layer: router.scorer.rows.detach().float().numpy() for layer, router in routers.items()}
