"""The FlexOlmo comparison as a kind of experiment: language models, measured in nats per token.

Knows which modules do what; knows nothing of how an arm is made. Light to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from pipelines.experiments.arms import ARMS
from pipelines.experiments.kind import ExperimentKind
from pipelines.experiments.settings import Experiment

if TYPE_CHECKING:
    from pipelines.experiments.results import Row
    from pipelines.experiments.world import Tell, Texts, World

__all__ = ["FlexOlmoComparison"]


@final
class FlexOlmoComparison(ExperimentKind):
    """Arms of arXiv 2507.07024 and ours, on held-out text."""

    settings = Experiment
    arms = ARMS
    metric = "nll"

    def texts(self, experiment: Experiment, *, tell: Tell | None) -> Texts:
        """Fetch the documents.

        Raises:
            ManifestError: The device is not there.
        """
        from pipelines.devices import find_device
        from pipelines.experiments.world import read_texts

        find_device(experiment.device)  # before anything is fetched
        return read_texts(experiment, tell=tell)

    def prepare(self, experiment: Experiment, texts: Texts, *, folder: Path, tell: Tell | None) -> bool:
        """Train the anchor; a published one is large."""
        from pipelines.experiments.settings import ScratchAnchor

        if not isinstance(experiment.anchor, ScratchAnchor):
            return False
        _ = self.world(experiment, texts, folder=folder, seed=experiment.seeds[0], tell=tell).anchor_folder
        return True

    def world(
        self, experiment: Experiment, texts: Texts, *, folder: Path, seed: int, tell: Tell | None
    ) -> World:
        """Make the world of a seed.

        Raises:
            DataError: A text of one's own is another than when the folder's results were made.
        """
        from pipelines.experiments.own_text import check_unchanged
        from pipelines.experiments.world import World

        if experiment.own_texts:
            check_unchanged(texts, folder)
        return World(experiment, texts, folder=folder, seed=seed, tell=tell)

    def run(self, world: World, arm: str) -> Iterator[Row]:
        """Measure one arm; some give several results."""
        from pipelines.experiments.results import rows_of

        owners = {domain: world.owner(domain) for domain in world.experiment.domains}
        for name, evaluation in ARMS.load(arm)(world).items():
            yield from rows_of(name, world.seed, evaluation, owners=owners)

    def owned(self, experiment: Experiment) -> Sequence[str]:
        """The owners' domains."""
        return experiment.domains

    def write(self, experiment: Experiment, rows: Sequence[Row], *, out: Path) -> list[Path]:
        """Write table, picture and JSON."""
        from pipelines.experiments.results import write_results

        return write_results(experiment, rows, out=out)
