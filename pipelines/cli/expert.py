"""``coterie expert``: what can be done with a single expert before it is registered.

Knows options and how to print a report; the arithmetic is in ``pipelines.compression``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import typer

from pipelines.cli.errors import writing_to
from pipelines.cli.loading import OptionError, quiet_transformers
from pipelines.cli.options import (
    PACKAGE_FOLDER,
    JsonOption,
    RegistryOption,
    complete_expert,
    examples,
    open_registry,
)
from pipelines.cli.output import human_bytes, note, print_fields, print_json, print_line, print_table
from pipelines.cli.progress import count_bar
from pipelines.cli.proxies import proxies
from pipelines.cli.scores import score
from pipelines.cli.statistics import statistics
from pipelines.cli.windows import domain_files

if TYPE_CHECKING:
    from pipelines.compression.report import CompressionReport
    from pipelines.compression.run import Compressed

__all__ = ["group"]

NewExpertFolder: TypeAlias = Annotated[Path | None, PACKAGE_FOLDER]
NewNameOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="OWNER/EXPERT",
        help="Name of the result; by default the expert's own, in the next version (compress) or with -ffn or -lora "
        "behind it (extract).",
        show_default=False,
    ),
]

group = typer.Typer(
    help="Make experts low-rank, publish statistics, choose proxies.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples("coterie expert compress acme/contracts --rank auto --out small"),
)

group.command(
    "proxies",
    epilog=examples(
        "coterie expert proxies --data law.jsonl --public web.jsonl --count 500 --out proxies.jsonl"
    ),
)(proxies)
group.command(
    "statistics",
    epilog=examples(
        "coterie expert statistics acme/whole --text own.jsonl --out with-statistics",
        "coterie expert statistics trained/acme/whole --text own.jsonl --attention own --out with-statistics",
        "coterie expert statistics acme/whole --text own.jsonl --embedder ./encoder --out with-statistics --json",
    ),
)(statistics)

group.command(
    "score",
    epilog=examples(
        "coterie expert score job.yaml --out with-scores",
        "coterie expert score job.yaml --expert acme/search --expert bob/search --metric ndcg@10 --out with-scores",
    ),
)(score)


@group.command(
    "compress",
    epilog=examples(
        "coterie expert compress acme/contracts --rank 16 --out small",
        "coterie expert compress trained/acme/contracts --rank energy=0.9 --out small --data law=law.jsonl",
        "coterie expert compress acme/contracts --rank auto --dry-run --json",
    ),
)
def compress(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT",
            help="owner/expert, owner/expert@VERSION, or a folder with a card, as 'coterie train' writes it.",
            autocompletion=complete_expert,
            show_default=False,
        ),
    ],
    rank: Annotated[
        str,
        typer.Option(
            "--rank",
            metavar="N|auto|energy=SHARE",
            help="Rank of every matrix; or the smallest that keeps a share of the squared singular values; or auto: "
            "0.9 of them, within a third of the bytes.",
            show_default=False,
        ),
    ],
    out: NewExpertFolder = None,
    name: NewNameOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DOMAIN=FILE",
            help="Held-out text on which anchor, full and low-rank expert are compared; may be given several times.",
            show_default=False,
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens in a window of the text.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="At most about this many tokens of a domain; 0: all.")
    ] = 4096,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; write nothing.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a low-rank expert (kind lora) out of a full one (kind ffn).

    The difference of every matrix to the anchor's is cut off after its largest singular values. Owner, licence
    and routing artefacts stay; the card says what the expert was made from. Reports the error (Frobenius norm, as a
    share of the difference's) and the bytes, and with --data what it costs in likelihood.
    """
    if (out is None) != dry_run:
        raise OptionError(
            "Give --out DIR to write the low-rank expert, or --dry-run only to see what it would cost."
        )
    from pipelines.compression.ranks import parse_rank

    parse_rank(rank)  # before torch is imported
    files = domain_files(data or [])
    store = open_registry(context, registry)

    from pipelines.compression.run import compress_expert
    from pipelines.evaluate import read_domains

    with (
        quiet_transformers(),
        count_bar("Compressing", unit="matrices") as progress,
        writing_to(out or Path()),
    ):
        done = compress_expert(
            source,
            rank=rank,
            registry=store,
            out=out,
            name=name,
            data=read_domains(files) if files else None,
            sequence_length=sequence_length,
            max_tokens=max_tokens or None,
            progress=progress,
        )
    if done.report.bytes_after >= done.report.bytes_before:
        note(
            f"Note: at this rank the expert takes {_share(done.report):.0%} of the full one's bytes; lower it."
        )
    if as_json:
        print_json(_plain(done, out))
        return
    _print_linears(done.report)
    _print_domains(done.report)
    _print_summary(done, out)


@group.command(
    "extract",
    epilog=examples(
        "coterie expert extract acme/whole --to ffn --out ffn",
        "coterie expert extract acme/whole --to lora --rank 16 --out small",
        "coterie expert extract acme/whole --to lora --rank 64 --dry-run --json",
    ),
)
def extract(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT",
            help="A whole model: owner/expert, owner/expert@VERSION, or a folder with a card.",
            autocompletion=complete_expert,
            show_default=False,
        ),
    ],
    to: Annotated[
        Literal["ffn", "lora"],
        typer.Option(
            "--to",
            help="What is made of its difference to the anchor: FFNs as they are, or an adapter.",
            show_default=False,
        ),
    ],
    rank: Annotated[
        int | None,
        typer.Option("--rank", min=1, metavar="N", help="Rank of an adapter's matrices.", show_default=False),
    ] = None,
    out: NewExpertFolder = None,
    name: NewNameOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only report; write nothing.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an expert of FFNs or adapters out of a whole fine-tuned model (kind dense).

    An FFN expert takes the model's FFNs as they are; an adapter approximates the difference of every linear to the
    anchor's (by mergekit). Says what has no place in the expert, attention or norms for instance, as a share of the
    whole difference's squared norm.
    """
    if (out is None) != dry_run:
        raise OptionError("Give --out DIR to write the expert, or --dry-run only to see what would be lost.")
    store = open_registry(context, registry)

    from pipelines.compression.extract import extract_expert

    with quiet_transformers(), count_bar("Extracting", unit="tensors") as progress, writing_to(out or Path()):
        done = extract_expert(
            source, kind=to, registry=store, rank=rank, out=out, name=name, progress=progress
        )
    if as_json:
        print_json({**done.to_dict(), "out": str(out) if out else None})
        return
    print_table(
        [(row.what, row.tensors, f"{row.share:.2%}") for row in done.left_out],
        columns=("LEFT OUT", "TENSORS", "OF THE DIFFERENCE"),
        empty="Everything is taken.",
        right=("TENSORS", "OF THE DIFFERENCE"),
    )
    print_line()
    print_fields(
        {
            "from": f"{done.source.name}@{done.source.version}",
            "error of what is taken": f"{done.kept_error:.2%} of its difference to the anchor (Frobenius norm)",
            "error in all": f"{done.relative_error:.2%} of the whole difference",
            "written": f"{out}: {done.name}@{done.version}, to be registered" if out else "nothing",
        }
    )


def _plain(done: Compressed, out: Path | None) -> dict[str, object]:
    return {
        "source": {"name": done.source.name, "version": done.source.version, "digest": done.source.digest},
        "name": done.name,
        "version": done.version,
        "digest": done.card.digest if done.card else None,
        "out": str(out) if out else None,
        **done.report.to_dict(),
    }


def _print_linears(report: CompressionReport) -> None:
    print_table(
        [
            (
                linear.name,
                linear.rank,
                linear.full_rank,
                f"{linear.relative_error:.2%}",
                human_bytes(linear.bytes_before),
                human_bytes(linear.bytes_after),
            )
            for linear in report.linears
        ],
        columns=("MATRIX", "RANK", "OF", "ERROR", "BEFORE", "AFTER"),
        empty="No matrix.",
        right=("RANK", "OF", "ERROR", "BEFORE", "AFTER"),
    )


def _print_domains(report: CompressionReport) -> None:
    if not report.domains:
        return
    print_line()
    print_table(
        [
            (
                name,
                f"{cost.anchor:.4f}",
                f"{cost.full:.4f}",
                f"{cost.low_rank:.4f}",
                f"{cost.relative_cost:+.2%}",
                cost.tokens,
            )
            for name, cost in report.domains.items()
        ],
        columns=("DOMAIN", "ANCHOR", "FULL", "LOW-RANK", "COST", "TOKENS"),
        empty="No domain.",
        right=("ANCHOR", "FULL", "LOW-RANK", "COST", "TOKENS"),
    )


def _print_summary(done: Compressed, out: Path | None) -> None:
    report = done.report
    print_line()
    print_fields(
        {
            "from": f"{done.source.name}@{done.source.version}",
            "error": f"{report.relative_error:.2%} of the difference to the anchor (Frobenius norm)",
            **_cap(report),
            "size": f"{human_bytes(report.bytes_before)} -> {human_bytes(report.bytes_after)}, "
            f"{_share(report):.1%}",
            "written": f"{out}: {done.name}@{done.version}, to be registered" if out else "nothing",
        }
    )


def _cap(report: CompressionReport) -> dict[str, str]:
    """Say so where ``auto`` came to the end of its bytes before the energy that it looks for."""
    if not report.capped:
        return {}
    from pipelines.compression.ranks import AUTO_ENERGY

    return {
        "cap": f"a third of the bytes, not {AUTO_ENERGY} of the energy, set the rank of {report.capped} of "
        f"{len(report.linears)} matrices; {report.energy:.1%} of the energy is kept"
    }


def _share(report: CompressionReport) -> float:
    return report.bytes_after / report.bytes_before
