"""``coterie plan`` and ``build`` for mergekit-moe's manifests, which need no registry.

Knows how to print such a plan; what is written is the composer's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experts.errors import CoterieError
from pipelines.cli.enrol import remarks_noted
from pipelines.cli.loading import quiet_transformers
from pipelines.cli.output import (
    human_bytes,
    human_count,
    note,
    print_fields,
    print_json,
    print_line,
    print_table,
)
from pipelines.cli.progress import byte_bar

if TYPE_CHECKING:
    from composer.mergekit_moe import MoEPlan

__all__ = ["Wanted", "built", "planned"]

Layout = Literal["mergekit", "classic"]


class MergekitOptionError(CoterieError):
    """An option that one of the two kinds of manifest does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The options that only mergekit-moe's manifests have."""

    layout: Layout
    seed: int
    pad: bool

    def refuse(self, *, composed: bool = False) -> None:
        """Refuse them for one of coterie's manifests.

        Raises:
            MergekitOptionError: One was given.
        """
        given = {
            "--layout": self.layout != "mergekit",
            "--seed": self.seed != 0,
            "--no-padding": not self.pad,
            "--composed": composed,
        }
        names = [name for name, is_given in given.items() if is_given]
        if names:
            raise MergekitOptionError(
                f"Only mergekit-moe's manifests (base_model, experts with source_model) have {', '.join(names)}; leave "
                f"{'it' if len(names) == 1 else 'them'} out."
            )


def planned(manifest: Path, wanted: Wanted, *, as_json: bool) -> bool:
    """Print the plan of a mergekit-moe manifest; return False if it is no such manifest."""
    plan = _plan(manifest, wanted)
    if plan is None:
        return False
    print_json(plan.to_dict()) if as_json else _print_plan(plan)
    return True


def built(manifest: Path, out: Path, wanted: Wanted, *, copy: bool, composed: bool, as_json: bool) -> bool:
    """Build from a mergekit-moe manifest; return False if it is no such manifest."""
    from time import perf_counter

    if composed:
        return _composed(manifest, out, wanted, as_json=as_json)
    plan = _plan(manifest, wanted)
    if plan is None:
        return False
    if copy:
        raise MergekitOptionError(
            f"{manifest} is a mergekit-moe manifest, whose build always copies: leave --copy out."
        )
    from composer.mergekit_moe.writing import build_moe

    started = perf_counter()
    with quiet_transformers(), byte_bar(f"Building {out}") as report:
        done = _Sum(report, total=int(plan.to_dict()["bytes"]))
        warnings = build_moe(plan, out, source=manifest.read_text(encoding="utf-8"), progress=done.add)
    seconds = perf_counter() - started
    for warning in warnings:
        note(f"Warning: {warning}")
    if as_json:
        print_json({**plan.to_dict(), "out": str(out), "seconds": round(seconds, 3)})
        return True
    print_line(
        f"Built {out}: {plan.to_dict()['architecture']} of {len(plan.experts)} experts on {plan.base.ref}, "
        f"{human_bytes(done.written)} in {seconds:.2f} s."
    )
    return True


def _composed(manifest: Path, out: Path, wanted: Wanted, *, as_json: bool) -> bool:
    """Make a coterie model; return False if it is no mergekit-moe manifest."""
    from composer.mergekit_moe import read_manifest

    wish = read_manifest(manifest)
    if wish is None:
        return False
    from composer.mergekit_moe.composed import compose_moe

    with quiet_transformers(), remarks_noted():
        names = compose_moe(wish, out, near=manifest.parent, seed=wanted.seed)
    if as_json:
        print_json({"format": "coterie", "recipe": "btx", "experts": list(names), "out": str(out)})
    else:
        print_line(
            f"Built {out}: a coterie model of {', '.join(names)} around {wish.base_model} (recipe btx)."
        )
    return True


class _Sum:
    """Adds up the bytes of single tensors for a bar that wants the sum."""

    def __init__(self, report: Any, *, total: int) -> None:
        self._report = report
        self._total = total
        self.written = 0

    def add(self, _name: str, size: int) -> None:
        self.written += size
        self._report(min(self.written, self._total), self._total)


def _plan(manifest: Path, wanted: Wanted) -> MoEPlan | None:
    from composer.mergekit_moe import plan_moe, read_manifest

    wish = read_manifest(manifest)
    if wish is None:
        return None
    plan = plan_moe(wish, near=manifest.parent, layout=wanted.layout, seed=wanted.seed, pad=wanted.pad)
    for warning in plan.warnings:
        note(f"Warning: {warning}")
    return plan


def _print_plan(plan: MoEPlan) -> None:
    row = plan.to_dict()
    print_fields(
        {
            "format": "mergekit-moe: a stock checkpoint without owners",
            "class": row["architecture"],
            "base": row["base_model"],
            "router": f"{row['gate_mode']}, {row['experts_per_token']} of {len(plan.experts)} experts a token",
            "shared": row["shared_expert"],
            "tensors": f"{row['layout']} names, {row['dtype'] or 'as stored'}",
            "parameters": f"{human_count(row['parameters_total'])} in all, "
            f"{human_count(row['parameters_active'])} active for a token",
            "size": human_bytes(row["bytes"]),
        }
    )
    print_line()
    print_table(
        [(expert["source_model"], expert["width"]) for expert in row["experts"]],
        columns=("EXPERT", "WIDTH"),
        empty="No expert.",
        right=("WIDTH",),
    )
    print_line()
    print_table(
        [(entry["source"], entry["tensors"], entry["reason"]) for entry in row["dropped"]],
        columns=("NOT USED OF", "TENSORS", "REASON"),
        empty="Every tensor is used.",
        right=("TENSORS",),
    )
