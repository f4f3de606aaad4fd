"""What the demonstration found: the figures to reach, ``report.json``, ``report.md`` and the tables on the screen.

Knows numbers and their meaning; measures nothing itself.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from pipelines.demo.settings import DemoSettings
    from pipelines.evaluate import Evaluation

__all__ = ["DemoReport", "Figure", "Sample", "nll_table", "routing_table"]

OWN_GAP = 0.05
"""Nats by which the composition may miss the best single expert of a domain."""

OPT_OUT_GAP = 0.02
"""Nats by which opting out may differ from never having joined, and may move the other domains."""

REQUEST_TOLERANCE = 1e-5
"""Largest logit difference at the request door; build and load must be bit-identical."""

REPORT_JSON = "report.json"
REPORT_MARKDOWN = "report.md"
NLL_PICTURE = "nll.png"
ROUTING_PICTURE = "routing.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A figure to reach.

    Attributes:
        name: What is compared.
        value: What came out.
        bound: What it must stay below.
        reached: Whether it does.
        unit: ``nats`` or ``logits``.
    """

    name: str
    value: float
    bound: float
    reached: bool
    unit: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One prompt, continued with everybody and without one owner."""

    owner: str
    prompt: str
    with_owner: str
    without_owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """Everything that is reported.

    Attributes:
        owners: Owner -> domain, in the order of the tables.
        evaluations: By arm.
        unseen: Domains that are nobody's.
        settings: The sizes of the run.
        trained_tokens: Tokens that each expert was trained on.
        dtype: What the anchor computed in.
        verify_optout: Door -> largest absolute logit difference over all owners.
        samples: One for each owner.
        stages: Stage -> seconds and peak memory.
    """

    owners: Mapping[str, str]
    evaluations: Mapping[str, Evaluation]
    unseen: tuple[str, ...]
    settings: DemoSettings
    trained_tokens: int
    dtype: str
    verify_optout: Mapping[str, float] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def nll(self) -> dict[str, dict[str, float]]:
        """Arm -> owners' domain -> nats per token."""
        return {
            arm: {domain: evaluation.domains[domain].nll for domain in self.owners.values()}
            for arm, evaluation in self.evaluations.items()
        }

    @property
    def unseen_nll(self) -> dict[str, dict[str, float]]:
        """Arm -> unseen domain -> nats per token, for the arms that were measured there."""
        return {
            arm: {domain: evaluation.domains[domain].nll for domain in self.unseen}
            for arm, evaluation in self.evaluations.items()
            if self.unseen and set(self.unseen) <= set(evaluation.domains)
        }

    @property
    def routing(self) -> dict[str, dict[str, float]]:
        """Domain -> anchor and owners -> share of the routed weight, in the whole composition."""
        return {domain: dict(score.routing) for domain, score in self.evaluations["composed"].domains.items()}

    def figures(self) -> list[Figure]:
        """Return every figure to reach, with what came out."""
        return [*self._composition_figures(), *self._opt_out_figures(), *self._door_figures()]

    def _composition_figures(self) -> list[Figure]:
        nll = self.nll
        mean = {arm: fmean(row.values()) for arm, row in nll.items()}
        experts = [arm for arm in nll if arm.startswith("expert:")]
        figures = [
            _below("mean of the composition against the anchor", mean["composed"], mean["anchor"]),
            _below(
                "mean of the composition against the weight average", mean["composed"], mean["weight_average"]
            ),
        ]
        for domain in self.owners.values():
            best = min(nll[arm][domain] for arm in experts)
            gap = nll["composed"][domain] - best
            figures.append(_below(f"{domain}: composition above the best single expert", gap, OWN_GAP))
        return figures

    def _opt_out_figures(self) -> list[Figure]:
        nll = self.nll
        figures = []
        for owner, domain in self.owners.items():
            without = nll[f"composed-without:{owner}"]
            never = abs(without[domain] - nll[f"never-joined:{owner}"][domain])
            others = [abs(without[d] - nll["composed"][d]) for d in self.owners.values() if d != domain]
            figures.append(_below(f"{domain} without {owner}: from never-joined", never, OPT_OUT_GAP))
            if others:
                figures.append(
                    _below(f"other domains without {owner}: largest move", max(others), OPT_OUT_GAP)
                )
        return figures

    def _door_figures(self) -> list[Figure]:
        return [
            Figure(
                name=f"opt-out at {door}: largest logit difference",
                value=value,
                bound=REQUEST_TOLERANCE if door == "request" else 0.0,
                reached=value <= (REQUEST_TOLERANCE if door == "request" else 0.0),
                unit="logits",
            )
            for door, value in self.verify_optout.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return what ``report.json`` holds."""
        import torch

        return {
            "nll": self.nll,
            "verify_optout": dict(self.verify_optout),
            "stages": {name: dict(stage) for name, stage in self.stages.items()},
            "unseen": self.unseen_nll,
            "bits_per_byte": {
                arm: {domain: score.bits_per_byte for domain, score in evaluation.domains.items()}
                for arm, evaluation in self.evaluations.items()
            },
            "routing": self.routing,
            "figures": [
                {
                    "name": figure.name,
                    "value": figure.value,
                    "bound": figure.bound,
                    "unit": figure.unit,
                    "reached": figure.reached,
                }
                for figure in self.figures()
            ],
            "measured_tokens": {
                domain: score.tokens for domain, score in self.evaluations["composed"].domains.items()
            },
            "trained_tokens": self.trained_tokens,
            "machine": {
                "processor": platform.machine(),
                "threads": torch.get_num_threads(),
                "dtype": self.dtype,
                "torch": torch.__version__,
            },
        }

    def write(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and the two pictures."""
        from pipelines.charts import draw_nll, draw_routing

        draw_nll(self.nll, folder / NLL_PICTURE, title="Held-out loss, nats per token")
        draw_routing(self.routing, folder / ROUTING_PICTURE, title="Who a domain is routed to")
        (folder / REPORT_JSON).write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")
        (folder / REPORT_MARKDOWN).write_text(_markdown(self), encoding="utf-8")


def _below(name: str, value: float, bound: float) -> Figure:
    return Figure(name=name, value=value, bound=bound, reached=value < bound, unit="nats")


# ---------------------------------------------------------------- on the screen


def nll_table(report: DemoReport) -> Table:
    """Nats per token by arm and domain, with the mean of the owners' domains."""
    rows = _nll_rows(report)
    return _table("Held-out loss, nats per token", rows[0], rows[1:])


def routing_table(report: DemoReport) -> Table:
    """Share of the routed weight by domain and owner."""
    rows = _routing_rows(report)
    return _table("Who a domain is routed to", rows[0], rows[1:])


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def _nll_rows(report: DemoReport) -> list[list[str]]:
    domains = list(report.owners.values())
    rows = [["arm", *domains, "mean", *report.unseen]]
    for arm, row in report.nll.items():
        unseen = report.unseen_nll.get(arm, {})
        cells = [f"{row[domain]:.3f}" for domain in domains]
        cells.append(f"{fmean(row.values()):.3f}")
        cells += [f"{unseen[domain]:.3f}" if domain in unseen else "-" for domain in report.unseen]
        rows.append([arm, *cells])
    return rows


def _routing_rows(report: DemoReport) -> list[list[str]]:
    names = list(next(iter(report.routing.values())))
    rows = [["domain", *names]]
    for domain, shares in report.routing.items():
        rows.append([domain, *(f"{shares[name]:.1%}" for name in names)])
    return rows


# ---------------------------------------------------------------- as a page


def _markdown(report: DemoReport) -> str:
    figures = report.figures()
    reached = sum(figure.reached for figure in figures)
    sizes = report.settings
    parts = [
        "# Three owners, one model, one opt-out",
        f"{reached} of {len(figures)} figures reached. Experts: rank {sizes.rank} on the FFN linears of layers "
        f"'{sizes.layers}', {sizes.steps} steps of {sizes.batch_size} x {sizes.sequence_length} tokens each; "
        f"measured on {sizes.measured_windows} windows of {sizes.sequence_length} held-out tokens a domain.",
        "## Held-out loss, nats per token",
        _markdown_table(_nll_rows(report)),
        f"![Held-out loss]({NLL_PICTURE})",
        "## Who a domain is routed to",
        _markdown_table(_routing_rows(report)),
        f"![Routing]({ROUTING_PICTURE})",
        "## Figures to reach",
        _markdown_table(
            [
                ["figure", "value", "bound", "reached"],
                *([f.name, _number(f), f"{f.bound:g}", "yes" if f.reached else "**no**"] for f in figures),
            ]
        ),
        "## The same prompt with and without its owner",
        *(_markdown_sample(sample) for sample in report.samples),
        "## Time and memory",
        _markdown_table(
            [
                ["stage", "seconds", "peak memory, MB"],
                *(
                    [name, f"{stage['seconds']:.1f}", f"{stage['peak_rss_mb']:,.0f}"]
                    for name, stage in report.stages.items()
                ),
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _number(figure: Figure) -> str:
    return f"{figure.value:.3f}" if figure.unit == "nats" else f"{figure.value:.2g}"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    first, *rest = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|" + "---|" * len(rows[0]), *rest])


def _markdown_sample(sample: Sample) -> str:
    return (
        f"With {sample.owner}:\n\n{_fenced(sample.prompt + sample.with_owner)}\n\n"
        f"Without {sample.owner}:\n\n{_fenced(sample.prompt + sample.without_owner)}"
    )


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text.rstrip()}\n{fence}"
