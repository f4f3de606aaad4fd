"""The upcycling comparison as a kind of experiment: rows with losses and costs, and the table made of both.

Knows rows and files; knows nothing of how an arm is made. Light to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, final

from pipelines.experiments.kind import ExperimentKind
from pipelines.experiments.upcycling.arms import ARMS
from pipelines.experiments.upcycling.settings import UpcyclingExperiment

if TYPE_CHECKING:
    from pipelines.experiments.results import Row
    from pipelines.experiments.upcycling.arms import Measured
    from pipelines.experiments.upcycling.world import UpcyclingWorld
    from pipelines.experiments.world import Tell, Texts

__all__ = ["UpcyclingComparison", "costs", "wins"]

_COSTS = ("training_tokens", "training_flops", "flops_per_token", "parameters")

_PAIRS = (
    ("bam_own_kv", "btx_top1"),
    ("bam_shared_kv", "btx_top1"),
    ("bam_own_kv", "btx_top2"),
    ("bam_own_kv", "btx_soft"),
    ("bam_own_kv", "btx_active_matched"),
    ("bam_shared_kv", "btx_active_matched"),
    ("bam_own_kv_equal_compute", "btx_top1"),
    ("bam_shared_kv_equal_compute", "btx_top1"),
)


@final
class UpcyclingComparison(ExperimentKind):
    """Arms of arXiv 2408.08274 and their baselines, on held-out text."""

    settings = UpcyclingExperiment
    arms = ARMS
    metric = "nll"

    def texts(self, experiment: UpcyclingExperiment, *, tell: Tell | None) -> Texts:
        """Fetch the documents."""
        from pipelines.experiments.upcycling.world import read_texts

        return read_texts(experiment, tell=tell)

    def prepare(
        self, experiment: UpcyclingExperiment, texts: Texts, *, folder: Path, tell: Tell | None
    ) -> bool:
        """Train the seed model."""
        _ = self.world(experiment, texts, folder=folder, seed=experiment.seeds[0], tell=tell).anchor_folder
        return True

    def world(
        self, experiment: UpcyclingExperiment, texts: Texts, *, folder: Path, seed: int, tell: Tell | None
    ) -> UpcyclingWorld:
        """Make the world of a seed."""
        from pipelines.experiments.upcycling.world import UpcyclingWorld

        return UpcyclingWorld(experiment, texts, folder=folder, seed=seed, tell=tell)

    def run(self, world: UpcyclingWorld, arm: str) -> Iterator[Row]:
        """Measure one arm; some give several results."""
        from pipelines.experiments.results import rows_of

        owners = {domain: world.owner(domain) for domain in world.settings.domains}
        for name, measured in ARMS.load(arm)(world).items():
            shown = owners if measured.owned else {}
            yield from rows_of(name, world.seed, measured.evaluation, owners=shown)
            yield from _cost_rows(name, world.seed, measured)

    def owned(self, experiment: UpcyclingExperiment) -> Sequence[str]:
        """The domains and the general text: a mixture is trained on equal parts of them."""
        return (*experiment.domains, experiment.general)

    def write(self, experiment: UpcyclingExperiment, rows: Sequence[Row], *, out: Path) -> list[Path]:
        """Write table, picture and JSON."""
        from experts.files import write_atomic
        from pipelines.experiments.results import write_results

        owned = self.owned(experiment)
        paths = write_results(experiment, rows, out=out, owned=owned)
        table = next(path for path in paths if path.suffix == ".md")
        text = table.read_text(encoding="utf-8") + "\n".join([*_costs_table(rows), *_wins_table(rows, owned)])
        write_atomic(table, (text + "\n").encode())
        return paths


def _cost_rows(arm: str, seed: int, measured: Measured) -> Iterator[Row]:
    from pipelines.experiments.results import Row

    values = (measured.tokens, measured.training_flops, measured.flops, measured.parameters)
    for metric, value in zip(_COSTS, values, strict=True):
        yield Row(arm=arm, seed=seed, domain="all", split="training", metric=metric, value=float(value))


def costs(rows: Sequence[Row]) -> Mapping[str, Mapping[str, float]]:
    """Return what every arm cost, by arm and metric; the same under every seed."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric in _COSTS:
            found.setdefault(row.arm, {})[row.metric] = row.value
    return found


def wins(rows: Sequence[Row], *, arm: str, against: str, owned: Sequence[str]) -> tuple[int, int, float]:
    """Compare two arms seed by seed on the mean over the domains.

    Returns:
        Under how many seeds ``arm`` has at most the loss of ``against``; how many there are; the mean difference of
        the losses, negative where ``arm`` is better.
    """
    means: dict[str, dict[int, float]] = {}
    for name in (arm, against):
        values: dict[int, dict[str, float]] = {}
        for row in rows:
            if row.arm == name and row.metric == "nll" and row.domain in owned:
                values.setdefault(row.seed, {})[row.domain] = row.value
        means[name] = {s: fmean(v.values()) for s, v in values.items() if len(v) == len(owned)}
    both = sorted(means[arm].keys() & means[against].keys())
    differences = [means[arm][seed] - means[against][seed] for seed in both]
    return sum(d <= 0 for d in differences), len(both), fmean(differences) if both else 0.0


def _costs_table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "What it cost: tokens since the seed model (all owners' and the mixture phase's), the arithmetic of that "
        "training, of one token (forward), and parameters. Arms named *equal_compute* spend in the mixture phase what "
        "BTX top-1 spends; all other mixtures train on equal tokens.",
        "",
        "| arm | training tokens | training TFLOP | MFLOP a token | parameters |",
        "|---|---|---|---|---|",
    ]
    for arm, values in costs(rows).items():
        tokens, training, flops, parameters = (values[metric] for metric in _COSTS)
        lines.append(
            f"| {arm} | {tokens:,.0f} | {training / 1e12:.2f} | {flops / 1e6:.2f} | {parameters:,.0f} |"
        )
    return lines


def _wins_table(rows: Sequence[Row], owned: Sequence[str]) -> list[str]:
    lines = [
        "",
        "Seed by seed, on the mean over the domains (a negative difference: the first arm is better):",
        "",
        "| arm | against | seeds with at most its loss | mean difference |",
        "|---|---|---|---|",
    ]
    there = {row.arm for row in rows}
    for arm, against in _PAIRS:
        if {arm, against} <= there:
            won, seeds, difference = wins(rows, arm=arm, against=against, owned=owned)
            lines.append(f"| {arm} | {against} | {won} of {seeds} | {difference:+.4f} |")
    return lines
