"""Draws the two pictures of an evaluation: losses by arm and domain, and routing by domain and owner.

Knows matrices, labels and PNG files; knows nothing of models. Drawn without a display.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["draw_nll", "draw_routing"]

_DARK = 0.6
"""Share of a colour scale beyond which numbers are written in white."""


def draw_nll(nll: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> Path:
    """Draw nats per token by arm (rows) and domain (columns), coloured by the distance to the domain's best.

    Args:
        nll: Arm -> domain -> nats per token; every arm has the same domains.
        path: The PNG to write.
        title: Above the picture.
    """
    arms, domains = list(nll), list(next(iter(nll.values())))
    best = {domain: min(row[domain] for row in nll.values()) for domain in domains}
    shades = [[nll[arm][domain] - best[domain] for domain in domains] for arm in arms]
    return _heatmap(
        shades,
        [[f"{nll[arm][domain]:.3f}" for domain in domains] for arm in arms],
        rows=arms,
        columns=domains,
        path=path,
        title=title,
        scale="nats above the domain's best",
        colours="YlOrBr",
    )


def draw_routing(routing: Mapping[str, Mapping[str, float]], path: Path, *, title: str) -> Path:
    """Draw the share of the routed weight by domain (rows) and owner (columns).

    Args:
        routing: Domain -> owner -> share between 0 and 1; every domain has the same owners.
        path: The PNG to write.
        title: Above the picture.
    """
    domains, owners = list(routing), list(next(iter(routing.values())))
    shares = [[routing[domain][owner] for owner in owners] for domain in domains]
    return _heatmap(
        shares,
        [[f"{share:.0%}" for share in row] for row in shares],
        rows=domains,
        columns=owners,
        path=path,
        title=title,
        scale="share of the routed weight",
        colours="Blues",
        largest=1.0,
    )


def _heatmap(
    values: list[list[float]],
    labels: list[list[str]],
    *,
    rows: list[str],
    columns: list[str],
    path: Path,
    title: str,
    scale: str,
    colours: str,
    largest: float | None = None,
) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 + 1.2 * len(columns), 1.6 + 0.42 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    axes: Any = figure.add_subplot()
    top = largest if largest is not None else max(max(row) for row in values) or 1.0
    image = axes.imshow(values, cmap=colours, vmin=0.0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.set_title(title)
    for y, row in enumerate(labels):
        for x, label in enumerate(row):
            colour = "white" if values[y][x] > _DARK * top else "black"
            axes.text(x, y, label, ha="center", va="center", color=colour)
    figure.colorbar(image, ax=axes, label=scale)
    figure.savefig(path, dpi=150)
    return path
