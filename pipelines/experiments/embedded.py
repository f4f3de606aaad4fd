"""The paper's recipe with rows that start where the paper's do: at an embedding of the owner's text.

Such rows lie in other coordinates than rows from states, so the public rows are made anew, in a registry of their own.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from pipelines.experiments.arms import COORDINATED, Results, learned_router, measured
from pipelines.experiments.world import World

__all__ = ["EmbeddedWorld", "paper_embedding"]


class EmbeddedWorld(World):
    """A seed's world in which public rows are projected embeddings.

    Args:
        world: Whose experiment, texts, seed and anchor it shares; it lies below its folder.
    """

    def __init__(self, world: World) -> None:
        super().__init__(
            world.experiment, world.texts, folder=world.folder / "embedded", seed=world.seed, tell=world.tell
        )
        self._world = world

    @cached_property
    def anchor_folder(self) -> Path:
        """The anchor of the world beside it."""
        return self._world.anchor_folder

    @cached_property
    def embedder(self) -> Path:
        """The folder of the experiment's embedder."""
        from pipelines.assets import minilm

        given = self.experiment.embedder
        return minilm(progress=self.tell) if given == "minilm" else Path(given)


def paper_embedding(world: World) -> Results:
    """The arm ``paper`` with rows that start at the projected mean embedding of the owner's documents."""
    embedded = EmbeddedWorld(world)
    names = embedded.train("paper", **COORDINATED, row_init=str(embedded.embedder))
    model = embedded.compose("paper_embedding", list(names.values()), learned_router(embedded))
    return {"paper_embedding": measured(world, model)}
