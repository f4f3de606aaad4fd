"""Table, picture and JSON of a comparison of retrievers, made from its rows.

Knows rows of numbers; knows nothing of how they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev

from experts.files import write_atomic
from pipelines.experiments.results import Row, Summary, summarize
from pipelines.experiments.retrieval.settings import RetrieverExperiment

__all__ = ["figures", "write_results"]

_MATRIX_ARM = "coterie"


def write_results(
    experiment: RetrieverExperiment,
    rows: Sequence[Row],
    *,
    out: Path,
    passes: Mapping[str, float] | None = None,
) -> list[Path]:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.png`` into a folder; return their paths.

    Args:
        experiment: What was run.
        rows: What was measured.
        out: The folder; made if it is not there.
        passes: What a query costs by arm, in passes through the base; see `pipelines.experiments.retrieval.costs`.
    """
    from pipelines.charts import draw_routing

    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{experiment.name}.{ending}" for ending in ("json", "md", "png")]
    settings = experiment.to_dict() | {"collections": None}  # a path of the machine it ran on
    data = {"rows": [asdict(row) for row in rows], "settings": settings}
    write_atomic(paths[0], (json.dumps(data, indent=1) + "\n").encode())
    write_atomic(paths[1], ("\n".join(_markdown(experiment, rows, passes or {})) + "\n").encode())
    matrix = _routing(rows)
    if not matrix:
        return paths[:2]
    draw_routing(matrix, paths[2], title=f"{experiment.name}: who answers ({_MATRIX_ARM})")
    return paths


def _routing(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Mean share over the seeds: collection -> owner -> share."""
    shares: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.arm == _MATRIX_ARM and row.metric.startswith("routed_to:"):
            owner = row.metric.removeprefix("routed_to:")
            shares.setdefault(row.domain, {}).setdefault(owner, []).append(row.value)
    return {domain: {owner: fmean(v) for owner, v in owners.items()} for domain, owners in shares.items()}


def figures(rows: Sequence[Row], *, owned: Sequence[str]) -> dict[str, list[float]]:
    """Return what the comparison is for, seed by seed, in points of nDCG@10 (hundredths).

    Args:
        rows: All rows.
        owned: The owners' domains; others are unseen ones.
    """
    values: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row.metric == "ndcg@10":
            values.setdefault((row.arm, row.seed), {})[row.domain] = 100 * row.value
    means = _owned_means(rows, owned=owned)
    others: dict[str, dict[int, float]] = {}
    for (arm, seed), domains in values.items():
        rest = [value for name, value in domains.items() if name not in owned]
        if rest:
            others.setdefault(arm, {})[seed] = fmean(rest)
    found = {
        f"coterie - {arm}": _differences(means, "coterie", arm)
        for arm in (
            "base",
            "multi_task",
            "best_single_expert",
            "multi_task_pooled",
            "paper",
            "coterie_means",
            "coterie_one_pass",
            "coterie_static_tokens",
        )
    }
    found["coterie - base, unseen"] = _differences(others, "coterie", "base")
    gaps = _differences(means, "dataset_oracle", "base")
    gains = _differences(means, "coterie", "base")
    found["% of the gap from base to dataset_oracle"] = [
        100 * gain / gap for gain, gap in zip(gains, gaps, strict=False) if gap
    ]
    found["owner left out: coterie-without-own - base"] = _differences(means, "coterie-without-own", "base")
    return {name: numbers for name, numbers in found.items() if numbers}


def _differences(values: Mapping[str, Mapping[int, float]], ours: str, theirs: str) -> list[float]:
    left, right = values.get(ours, {}), values.get(theirs, {})
    return [left[seed] - right[seed] for seed in sorted(set(left) & set(right))]


def _markdown(experiment: RetrieverExperiment, rows: Sequence[Row], passes: Mapping[str, float]) -> list[str]:
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    lines = [
        f"# {experiment.name}",
        "",
        f"nDCG@10 on test queries, higher is better: mean ± standard deviation over seeds {seeds}. `mean` is over the "
        "owners' domains; what stands right of it nobody trained on. `p owned` and `p unseen` are the largest p-values "
        "of the seeds in a paired randomisation test against the base.",
        "",
        *_table(summarize(rows, owned=experiment.domains, metric="ndcg@10"), rows),
        "",
        "In points of nDCG@10, seed by seed:",
        "",
        "| figure | mean | seeds |",
        "|---|---|---|",
    ]
    for name, numbers in figures(rows, owned=experiment.domains).items():
        spread = f" ± {stdev(numbers):.2f}" if len(numbers) > 1 else ""
        each = ", ".join(f"{number:+.2f}" for number in numbers)
        lines.append(f"| {name} | {fmean(numbers):+.2f}{spread} | {each} |")
    routing = summarize(rows, owned=experiment.domains, metric="routed_to_owner")
    if routing.cells:
        lines += [
            "",
            "Share of the queries whose largest weight is their own domain's:",
            "",
            *_plain_table(routing),
        ]
    lines += _costs(experiment, rows, passes)
    return [*lines, "", "## Arms", "", *_legend(), "", "## What differs from the paper", "", *_DIFFERENCES]


def _costs(experiment: RetrieverExperiment, rows: Sequence[Row], passes: Mapping[str, float]) -> list[str]:
    """What a query costs beside what it gives; arms whose rows are not there are left out."""
    means = _owned_means(rows, owned=experiment.domains)
    lines = [
        "",
        "A query's cost, in passes through the base (the layers that its rows go through, over the base's), and what "
        f"that buys. Fusing {len(experiment.domains)} experts by the base's own embedding takes 1 + E passes; from the "
        "first adapted layer on, where what lies below is shared; E where the choice is made before:",
        "",
        "| arm | passes | mean | points to `coterie` |",
        "|---|---|---|---|",
    ]
    ours = means.get(_MATRIX_ARM, {})
    for arm, cost in passes.items():
        found = means.get(arm)
        if not found:
            continue
        gaps = [found[seed] - ours[seed] for seed in sorted(set(found) & set(ours))]
        gap = f"{fmean(gaps):+.2f}" if gaps and arm != _MATRIX_ARM else "-"
        lines.append(f"| {arm} | {cost:.2f} | {fmean(found.values()) / 100:.3f} | {gap} |")
    return lines if len(lines) > 6 else []


def _owned_means(rows: Sequence[Row], *, owned: Sequence[str]) -> dict[str, dict[int, float]]:
    """Mean nDCG@10 over the owners' domains, in points: arm -> seed -> value, where all of them were measured."""
    values: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row.metric == "ndcg@10" and row.domain in owned:
            values.setdefault((row.arm, row.seed), {})[row.domain] = 100 * row.value
    means: dict[str, dict[int, float]] = {}
    for (arm, seed), domains in values.items():
        if len(domains) == len(owned):
            means.setdefault(arm, {})[seed] = fmean(domains.values())
    return means


_DIFFERENCES = (
    "The paper (arXiv 2409.02685) adapts Contriever for seven BEIR data sets, with training sets of up to "
    "503,000 pairs. Here the base is smaller and stronger, and an owner has some hundred pairs that "
    "nobody judged: the two sides of a docstring, a term and its code's title. Test queries of a domain "
    "are pairs whose documents no owner trained on; the other documents of its collection are partly "
    "those of training pairs.",
    "",
    "Adapters lie in the upper layers only, so that one pass can route and adapt, and a query is told "
    "apart from all of its owner's documents, whose vectors are constant. `paper` and `classifier_router` "
    "are labelled on training queries by nDCG@10; the paper does not say what becomes of ties, its code "
    "takes the first of a list, and here every tied expert gets its part. `multi_task_pooled` is no "
    "baseline of the paper: it needs everybody's text in one place.",
)


def _legend() -> list[str]:
    from pipelines.experiments.retrieval.arms import ARMS

    return [f"* `{name}`: {' '.join((ARMS.load(name).__doc__ or '').split())}" for name in ARMS.builtin]


def _p_values(rows: Sequence[Row], arm: str, group: str) -> str:
    found = [row.value for row in rows if (row.arm, row.domain, row.metric) == (arm, group, "p_vs_base")]
    return f"{max(found):.4f}" if found else "-"


def _table(summary: Summary, rows: Sequence[Row]) -> list[str]:
    lines = _plain_table(summary)
    lines[0] += " p owned | p unseen |"
    lines[1] += "---|---|"
    for number, arm in enumerate(summary.cells, start=2):
        lines[number] += f" {_p_values(rows, arm, 'owned')} | {_p_values(rows, arm, 'unseen')} |"
    return lines


def _plain_table(summary: Summary) -> list[str]:
    columns = [name for name in summary.domains if any(name in cells for cells in summary.cells.values())]
    lines = ["| arm | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for arm, cells in summary.cells.items():
        shown = [f"{cells[c][0]:.3f} ± {cells[c][1]:.3f}" if c in cells else "-" for c in columns]
        lines.append(f"| {arm} | " + " | ".join(shown) + " |")
    return lines
