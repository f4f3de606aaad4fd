"""``coterie export`` and ``import``: from a composed folder to a checkpoint of a stock class, and back.

Knows how to say what will be written and what came of it; the layouts are the composer's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import DeviceOption, OptionError, open_folder
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import human_bytes, note, print_fields, print_json, print_line, print_table
from pipelines.cli.progress import byte_bar, spinner
from pipelines.cli.windows import domain_files

if TYPE_CHECKING:
    from pipelines.calibration import BiasCost
    from registry import Registry

__all__ = ["export_folder", "import_folder"]

EXPORT_EXAMPLES = examples(
    "coterie export composed stock --to mixtral",
    "coterie export composed stock --to flex_olmo --opt-out acme",
    "coterie export composed stock --to qwen3_moe --densify --dry-run",
    "coterie export composed stock --to flex_olmo --calibrate --data law=law.jsonl",
)
IMPORT_EXAMPLES = examples(
    "coterie import FlexOlmo-7x7B-1T owners.yaml --out imported",
    "coterie import FlexOlmo-7x7B-1T owners.yaml --out imported --json",
)


def _complete_target(incomplete: str) -> list[str]:
    from composer.export import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def export_folder(
    context: typer.Context,
    folder: OutFolder,
    out: Annotated[
        Path, typer.Argument(metavar="STOCK", help="The folder to write; must not exist.", show_default=False)
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help="flex_olmo (OLMo-2 bases), mixtral (Llama, Mistral), qwen3_moe (Qwen3), olmoe (Qwen3 with one head).",
            autocompletion=_complete_target,
            show_default=False,
        ),
    ],
    opt_out: OptOutOption = None,
    densify: Annotated[
        bool,
        typer.Option(
            "--densify",
            help="Write low-rank experts in full, and copies of the base where a layer has no experts.",
        ),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Drop the owners' router biases, which no stock class has, and say what that costs on --data.",
        ),
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DOMAIN=FILE",
            help="Held-out text for --calibrate: .jsonl with a text field a line, or .txt; may be given several times.",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be written and write nothing.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a composition as a stock checkpoint.

    It needs no coterie to be loaded. Written only where the stock class computes the same logits; otherwise every
    reason is listed. Owners who have opted out of the registry are left out.
    """
    if calibrate != bool(data):
        raise OptionError(
            "--calibrate and --data DOMAIN=FILE go together: the cost is measured on that text."
        )
    from time import perf_counter

    from composer.export.exporting import export, plan_export

    store = open_registry(context, registry)
    planned = plan_export(
        folder, to, opt_out=set(opt_out or ()), registry=store, densify=densify, drop_bias=calibrate
    )
    for owner in sorted(set(planned.left_out) - set(opt_out or ())):
        note(f"Note: {owner} has opted out since the build and is left out.")
    summary = planned.to_dict()
    costs: dict[str, BiasCost] = {}
    if planned.dropped:
        costs = _bias_cost(folder, data or [], opt_out=planned.left_out, registry=store, device=device)
        summary["calibration"] = {domain: cost.to_dict() for domain, cost in costs.items()}
    elif calibrate:
        note("Note: there is no router bias to drop, so --calibrate changes nothing.")
    if not as_json and costs:
        _print_costs(costs)
    if dry_run:
        print_json(summary) if as_json else _print_export(summary)
        return
    started = perf_counter()
    with byte_bar(f"Writing {out}") as report:
        export(planned, out, progress=_adding(report, total=planned.bytes), notes=_cost_notes(costs))
    seconds = perf_counter() - started
    if as_json:
        print_json({**summary, "out": str(out), "seconds": round(seconds, 3)})
        return
    print_line(
        f"Wrote {out}: {summary['architecture']} with {len(summary['experts'])} experts beside the base "
        f"{summary['base']}, {human_bytes(planned.bytes)} in {seconds:.2f} s."
    )


def _bias_cost(
    folder: Path, data: list[str], *, opt_out: Collection[str], registry: Registry, device: str
) -> dict[str, BiasCost]:
    from pipelines.calibration import bias_cost
    from pipelines.evaluate import read_domains

    texts = read_domains(domain_files(data))
    with (
        spinner("Measuring"),
        open_folder(folder, opt_out=opt_out, registry=registry, device=device) as (model, tokenizer),
    ):
        return bias_cost(model, tokenizer, texts)


def _print_costs(costs: Mapping[str, BiasCost]) -> None:
    print_table(
        [
            (domain, f"{cost.nll:.4f}", f"{cost.nll_without_bias:.4f}", f"{cost.change:+.4f}")
            for domain, cost in costs.items()
        ],
        columns=("DOMAIN", "LOSS", "WITHOUT BIAS", "CHANGE"),
        empty="No domain.",
        right=("LOSS", "WITHOUT BIAS", "CHANGE"),
    )


def _cost_notes(costs: Mapping[str, BiasCost]) -> list[str]:
    return [
        f"measured on {domain}: {cost.nll:.4f} nats per token with the biases, {cost.nll_without_bias:.4f} without"
        for domain, cost in costs.items()
    ]


def _adding(report: Callable[[int, int], None], *, total: int) -> Callable[[str, int], None]:
    """Return what adds up the bytes of single tensors for a bar that wants the sum."""
    done = 0

    def add(_name: str, size: int) -> None:
        nonlocal done
        done += size
        report(done, total)

    return add


def _print_export(summary: dict[str, Any]) -> None:
    print_fields(
        {
            "class": summary["architecture"],
            "settings": summary["settings"],
            "base": summary["base"]
            + ("" if any(row["index"] == 0 for row in summary["experts"]) else " (expert 0)"),
            "size": f"{human_bytes(summary['bytes'])} in {summary['tensors']} tensors of {summary['dtype']}",
            "written in full": summary["densified"],
            "dropped": summary["dropped"],
            "mixed": summary["mixed"],
            "left out": summary["left_out"],
        }
    )
    print_line()
    print_table(
        [(row["index"], row["name"], row["owner"]) for row in summary["experts"]],
        columns=("INDEX", "EXPERT", "OWNER"),
        empty="No expert.",
        right=("INDEX",),
    )


def import_folder(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A FlexOlmo checkpoint's folder.", show_default=False),
    ],
    owners: Annotated[
        Path,
        typer.Argument(
            metavar="OWNERS",
            help="YAML with base: NAME and experts: a list of name, domain and license, in the checkpoint's order.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="DIR", help="The folder to write; must not exist.", show_default=False),
    ],
    as_json: JsonOption = False,
) -> None:
    """Take a FlexOlmo checkpoint apart into experts.

    Expert 0 and everything shared become a base, the other experts' FFNs and router rows packages of their owners,
    and a manifest puts them together again.
    """
    from composer.export.importing import import_checkpoint
    from composer.export.owners import OwnersFile

    named = OwnersFile.from_file(owners)
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    with byte_bar(f"Importing {checkpoint}") as report:
        done = import_checkpoint(checkpoint, named, out, progress=_adding(report, total=size))
    if not done.in_canonical_order:
        note(
            "Note: compositions sort experts by name, so an export will not have them in this checkpoint's order."
        )
    if as_json:
        print_json({"out": str(done.out), "base": done.base, "experts": list(done.experts)})
        return
    print_line(f"Wrote {out}: the base {done.base} and {len(done.experts)} experts. To compose them:")
    print_line(f"  coterie base add {out / 'base'} --name {done.base}")
    print_line(f"  coterie base public-routing {done.base} --from {out / 'public-routing'}")
    for folder in done.folders:
        print_line(f"  coterie register {folder}")
    print_line(f"  coterie build {out / 'manifest.yaml'} composed")
