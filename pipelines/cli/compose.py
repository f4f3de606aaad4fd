"""``coterie plan``, ``build`` and ``verify-optout``: from a manifest to a composed folder, and the proof.

Knows how to print a plan and a comparison; composing is the composer's business.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pipelines.cli.catalog import layer_ranges
from pipelines.cli.errors import FAILURE
from pipelines.cli.loading import quiet_transformers
from pipelines.cli.options import (
    JsonOption,
    OutFolder,
    RegistryOption,
    complete_owner,
    examples,
    open_registry,
)
from pipelines.cli.output import (
    human_bytes,
    human_count,
    note,
    print_fields,
    print_json,
    print_line,
    print_table,
)
from pipelines.cli.progress import byte_bar, spinner

if TYPE_CHECKING:
    from composer import Plan
    from registry import Registry

__all__ = ["build_folder", "show_plan", "verify_optout_folder"]

PLAN_EXAMPLES = examples(
    "coterie plan manifest.yaml", "coterie plan manifest.yaml --json", "coterie plan mergekit-moe.yml"
)
BUILD_EXAMPLES = examples(
    "coterie build manifest.yaml composed",
    "coterie build manifest.yaml composed --copy",
    "coterie build manifest.yaml composed --dry-run",
    "coterie build mergekit-moe.yml mixtral --layout classic",
)
VERIFY_EXAMPLES = examples(
    "coterie verify-optout composed", "coterie verify-optout composed --owner acme --text held-out.jsonl"
)

ManifestArgument = Annotated[
    Path,
    typer.Argument(
        metavar="MANIFEST", help="A manifest (YAML), coterie's or mergekit-moe's.", show_default=False
    ),
]


LayoutOption = Annotated[
    Literal["mergekit", "classic"],
    typer.Option(
        "--layout",
        help="How a mergekit-moe manifest's tensors are named: as mergekit names them, or one tensor an expert and "
        "matrix, which every version of transformers and other programs read.",
    ),
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="Seed of a mergekit-moe manifest's random gates and noise.")
]
NoPaddingOption = Annotated[
    bool,
    typer.Option(
        "--no-padding",
        help="Refuse a mergekit-moe manifest's experts of different widths instead of padding them with zeros.",
    ),
]


def show_plan(
    context: typer.Context,
    manifest: ManifestArgument,
    layout: LayoutOption = "mergekit",
    seed: SeedOption = 0,
    no_padding: NoPaddingOption = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a manifest and show what it would build.

    Everything is resolved, checked and costed: parameters, bytes, compute for a token. Nothing is written. Of a
    mergekit-moe manifest it also says which tensors are left out of the models it names, and why.
    """
    from pipelines.cli import mergekit_moe

    wanted = mergekit_moe.Wanted(layout=layout, seed=seed, pad=not no_padding)
    if mergekit_moe.planned(manifest, wanted, as_json=as_json):
        return
    wanted.refuse()
    planned = _plan(manifest, open_registry(context, registry))
    if as_json:
        print_json(planned.to_dict())
        return
    _print_plan(planned.to_dict())


def build_folder(
    context: typer.Context,
    manifest: ManifestArgument,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="The folder to write; must not exist.", show_default=False)
    ],
    copy: Annotated[
        bool,
        typer.Option(
            "--copy", help="Copy every file instead of linking it, so that the folder stands alone."
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    layout: LayoutOption = "mergekit",
    seed: SeedOption = 0,
    no_padding: NoPaddingOption = False,
    composed: Annotated[
        bool,
        typer.Option(
            "--composed",
            help="Make a coterie model of a mergekit-moe manifest (recipe btx), for models that no stock class holds.",
        ),
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compose the experts of a manifest into one folder.

    transformers can load it. The registry's files are immutable and are linked, so a build takes milliseconds
    and no disk space.

    A manifest of mergekit-moe is taken as it is: the result is the stock checkpoint that mergekit would write, without
    a registry, owners or opting out.
    """
    from time import perf_counter

    from composer import build
    from pipelines.cli import mergekit_moe

    wanted = mergekit_moe.Wanted(layout=layout, seed=seed, pad=not no_padding)
    if dry_run and mergekit_moe.planned(manifest, wanted, as_json=as_json):
        return
    if not dry_run and mergekit_moe.built(
        manifest, out, wanted, copy=copy, composed=composed, as_json=as_json
    ):
        return
    wanted.refuse(composed=composed)
    store = open_registry(context, registry)
    planned = _plan(manifest, store)
    if dry_run:
        print_json(planned.to_dict()) if as_json else _print_plan(planned.to_dict())
        return
    started = perf_counter()
    with byte_bar(f"Building {out}") as report:
        done = _Sum(report, total=planned.bytes)
        folder = build(planned, out, registry=store, copy=copy, progress=done.add)
    seconds = perf_counter() - started
    if as_json:
        print_json({**planned.to_dict(), "out": str(folder), "copied": copy, "seconds": round(seconds, 3)})
        return
    experts = f"{len(planned.experts)} expert{'s' if len(planned.experts) != 1 else ''}"
    print_line(
        f"Built {folder}: {experts} of {', '.join(planned.owners)} on {planned.base.name}, "
        f"{human_bytes(planned.bytes)} {'copied' if copy else 'linked'} in {seconds:.2f} s."
    )


class _Sum:
    """Adds up the bytes of single files for a bar that wants the sum."""

    def __init__(self, report: Any, *, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def add(self, _path: str, size: int) -> None:
        self._done += size
        self._report(min(self._done, self._total), self._total)


def _plan(manifest: Path, store: Registry) -> Plan:
    from composer import Manifest, plan
    from composer.lock import LOCK_NAME

    # a composed folder's own manifest was written for those who were in it at first
    changed = (manifest.parent / LOCK_NAME).is_file()
    planned = plan(Manifest.from_file(manifest), store, changed=changed)
    for warning in planned.warnings:
        note(f"Warning: {warning}")
    return planned


def _router_text(router: dict[str, Any]) -> str:
    if "route_on" in router:
        return f"{router['scorer']} on the {router['route_on'].replace('_', ' ')}, {router['selector']}"
    return f"{router['scorer']} ({router['context']}), {router['selector']} {router['top_k']}"


def _print_plan(plan: dict[str, Any]) -> None:
    from composer.recipes import RECIPES

    print_fields(
        {
            "name": plan["name"],
            "recipe": plan["recipe"],
            "router": _router_text(plan["router"]) if RECIPES.load(plan["recipe"]).routes else None,
            "base": f"{plan['base']['name']}, {human_bytes(plan['base']['bytes'])}, "
            f"fingerprint {plan['base']['fingerprint'][:12]}",
            "parameters": f"{human_count(plan['parameters_total'])} in all, "
            f"{human_count(plan['parameters_active'])} active for a token",
            "size": human_bytes(plan["bytes"]),
            "compute": f"{human_count(plan['flops_per_token'])} FLOPs per token",
            "opt-out class": plan["optout_class"],
            "left out": plan["left_out"],
        }
    )
    print_line()
    print_table(
        [
            (
                f"{expert['name']}@{expert['version']}",
                expert["domain"],
                expert["license"],
                expert["kind"],
                layer_ranges(expert["layers"]),
                expert["rank"],
                human_count(expert["parameters"]),
                human_bytes(expert["bytes"]),
            )
            for expert in plan["experts"]
        ],
        columns=("EXPERT", "DOMAIN", "LICENSE", "KIND", "LAYERS", "RANK", "PARAMETERS", "SIZE"),
        empty="No expert.",
        right=("RANK", "PARAMETERS", "SIZE"),
    )


def verify_optout_folder(
    out: OutFolder,
    owner: Annotated[
        str | None,
        typer.Option(
            "--owner",
            help="Only this owner; by default each in turn, whose text alone was tuned on included.",
            autocompletion=complete_owner,
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Real prompts beside the random ones: the first documents of a .jsonl or .txt file.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that opting out equals never having joined.

    The model that an owner never joined is composed and compared with opting out, through every door: build and
    load must give the same logits bit for bit, a request the same within 1e-5. Exits with 1 where they do not.
    """
    from composer import verify_optout

    prompts: list[str] = []
    if text is not None:
        from pipelines.train.windows import read_documents

        prompts = read_documents([text])[:_PROMPTS]
    with quiet_transformers(), spinner("Comparing") as report:
        rows = verify_optout(out, owner=owner, prompts=prompts, progress=report)
    failed = [row for row in rows if not row.passed]
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        print_table(
            [
                (
                    row.owner,
                    row.door,
                    f"{row.max_abs_diff:.1e}",
                    row.bit_identical,
                    row.prompts,
                    "ok" if row.passed else "FAILED",
                )
                for row in rows
            ],
            columns=("OWNER", "DOOR", "LARGEST DIFFERENCE", "BIT-IDENTICAL", "PROMPTS", "RESULT"),
            empty="There is no owner to leave out.",
            right=("LARGEST DIFFERENCE", "PROMPTS"),
        )
        if rows and not any(row.door == "request" for row in rows):
            note("Note: a request cannot leave anybody out of this composition, so that door has no row.")
    if failed:
        note(
            f"Error: opting out is not what never having joined gives: {len(failed)} of {len(rows)} comparisons failed."
        )
        raise typer.Exit(FAILURE)


_PROMPTS = 8
"""Documents of a file that serve as prompts."""
