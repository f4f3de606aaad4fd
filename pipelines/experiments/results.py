"""Results of an experiment: rows as JSON, and the table and picture made from them.

Knows rows of numbers; knows nothing of how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from experts.files import write_atomic

if TYPE_CHECKING:
    from pipelines.evaluate import Evaluation
    from pipelines.experiments.settings import Experiment
    from pipelines.experiments.upcycling.settings import UpcyclingExperiment

__all__ = ["Row", "Summary", "rows_of", "summarize", "write_results"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One number.

    Attributes:
        arm: What was measured.
        seed: Under which seed.
        domain: On which domain.
        split: ``heldout``.
        metric: ``nll`` (nats a token), ``bits_per_byte``, ``routed_to_owner`` (share of the routed weight),
            ``routing_accuracy`` (share of the tokens whose largest weight is the owner's), ``owner_load`` (share of
            the tokens that use the owner's expert at all) or ``router_entropy`` (nats, before selection).
        value: The number.
    """

    arm: str
    seed: int
    domain: str
    split: str
    metric: str
    value: float


def rows_of(arm: str, seed: int, evaluation: Evaluation, *, owners: Mapping[str, str]) -> list[Row]:
    """Turn one evaluation into rows.

    Args:
        arm: Name of the arm.
        seed: Of the run.
        evaluation: What was measured.
        owners: Owner by domain, for the share of the routed weight; domains of nobody are not in it.
    """
    rows = []
    for domain, score in evaluation.domains.items():
        values = {"nll": score.nll, "bits_per_byte": score.bits_per_byte}
        if score.routing and domain in owners:
            values["routed_to_owner"] = score.routing.get(owners[domain], 0.0)
        if score.sent and domain in owners:
            values["routing_accuracy"] = score.sent.get(owners[domain], 0.0)
        if score.load and domain in owners:
            used = (share for name, share in score.load.items() if name.startswith(f"{owners[domain]}/"))
            values["owner_load"] = sum(used)
        if score.router_entropy is not None:
            values["router_entropy"] = score.router_entropy
        rows += [
            Row(arm=arm, seed=seed, domain=domain, split="heldout", metric=metric, value=value)
            for metric, value in values.items()
        ]
    return rows


_ROUTING_TABLES = {
    "Share of the routed weight that goes to the domain's owner": "routed_to_owner",
    "Routing accuracy, the share of a domain's tokens whose largest weight is the owner's": "routing_accuracy",
    "Load, the share of a domain's tokens that use the owner's expert at all": "owner_load",
    "Entropy of the router's distribution before selection, nats": "router_entropy",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A metric by arm and domain.

    Attributes:
        domains: Columns; ``mean`` is over the owned domains.
        cells: Arm -> column -> mean and standard deviation over the seeds (0 where there is one).
    """

    domains: tuple[str, ...]
    cells: Mapping[str, Mapping[str, tuple[float, float]]]


def summarize(rows: Iterable[Row], *, owned: Sequence[str], metric: str = "nll") -> Summary:
    """Average a metric over the seeds.

    Args:
        rows: All rows of an experiment.
        owned: The owners' domains, in the order of the table.
        metric: Which.
    """
    values: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        if row.metric == metric:
            values.setdefault(row.arm, {}).setdefault(row.domain, {})[row.seed] = row.value
    others = sorted({domain for arm in values.values() for domain in arm} - set(owned))
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for arm, domains in values.items():
        cells[arm] = {domain: _mean_and_deviation(seeds.values()) for domain, seeds in domains.items()}
        if all(domain in domains for domain in owned):
            seeds = set.intersection(*(set(domains[domain]) for domain in owned))
            cells[arm]["mean"] = _mean_and_deviation(
                fmean(domains[domain][seed] for domain in owned) for seed in sorted(seeds)
            )
    return Summary(domains=(*owned, "mean", *others), cells=cells)


def _mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    numbers = list(values)
    return fmean(numbers), stdev(numbers) if len(numbers) > 1 else 0.0


def write_results(
    experiment: Experiment | UpcyclingExperiment,
    rows: Sequence[Row],
    *,
    out: Path,
    owned: Sequence[str] | None = None,
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into a folder; return their paths.

    Args:
        experiment: What was run.
        rows: What was measured.
        out: The folder; made if it is not there.
        owned: Domains that the mean is over; None: the experiment's.
    """
    from pipelines.charts import draw_nll

    out.mkdir(parents=True, exist_ok=True)
    data: dict[str, Any] = {"rows": [asdict(row) for row in rows], "settings": experiment.to_dict()}
    paths = [out / f"{experiment.name}.{ending}" for ending in ("json", "md", "png")]
    write_atomic(paths[0], (json.dumps(data, indent=1) + "\n").encode())
    owned = experiment.domains if owned is None else owned
    summary = summarize(rows, owned=owned)
    routing = {
        title: summarize(rows, owned=owned, metric=metric) for title, metric in _ROUTING_TABLES.items()
    }
    mean = f"`mean` is over {'the owned domains' if owned == experiment.domains else ', '.join(owned)}."
    write_atomic(paths[1], _markdown(experiment, summary, routing, mean=mean).encode())
    means = {
        arm: {domain: columns[domain][0] for domain in summary.domains}
        for arm, columns in summary.cells.items()
        if all(domain in columns for domain in summary.domains)
    }
    draw_nll(means, paths[2], title=experiment.name)
    return paths


def _markdown(
    experiment: Experiment | UpcyclingExperiment,
    summary: Summary,
    routing: Mapping[str, Summary],
    *,
    mean: str,
) -> str:
    seeds = ", ".join(map(str, experiment.seeds))
    text = [
        f"# {experiment.name}",
        "",
        f"Negative log-likelihood of held-out text, nats per token, lower is better: mean ± standard deviation over "
        f"seeds {seeds}. {mean}",
        "",
        *_table(summary),
    ]
    for title, shares in routing.items():
        if shares.cells:
            text += ["", f"{title}:", "", *_table(shares)]
    return "\n".join(text) + "\n"


def _table(summary: Summary) -> list[str]:
    columns = [
        domain for domain in summary.domains if any(domain in cells for cells in summary.cells.values())
    ]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, cells in summary.cells.items():
        shown = [f"{cells[c][0]:.3f} ± {cells[c][1]:.3f}" if c in cells else "-" for c in columns]
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    return lines
