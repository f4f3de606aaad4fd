"""``coterie memorization``: what a composed model has memorised, with and without each owner.

Knows files and how to print figures; they are measured by ``pipelines.memorization``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipelines.cli.loading import DeviceOption, OptionError, note_if_alone, open_folder
from pipelines.cli.options import (
    JsonOption,
    OutFolder,
    RegistryOption,
    complete_owner,
    examples,
    open_registry,
)
from pipelines.cli.output import print_json, print_line, print_table
from pipelines.cli.progress import count_bar

if TYPE_CHECKING:
    from pipelines.memorization.check import ArmReport

__all__ = ["memorization"]

EXAMPLES = examples(
    "coterie memorization composed --canaries canaries.jsonl",
    "coterie memorization composed --text training.jsonl --prefix-tokens 32 --new-tokens 64 --samples 10",
    "coterie memorization composed --canaries canaries.jsonl --text training.jsonl --owner acme --json",
)

REFERENCES, PREFIX, NEW, DOCUMENTS = 255, 32, 64, 64


def memorization(
    context: typer.Context,
    out: OutFolder,
    canaries: Annotated[
        Path | None,
        typer.Option(
            "--canaries",
            metavar="JSONL",
            help='Planted texts: {"text": ..., "secret": ...} on every line, and "alphabet" if the secret was not '
            "drawn from digits or letters.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Training text that may be extracted: .jsonl with a text field a line, or .txt.",
            show_default=False,
        ),
    ] = None,
    owner: Annotated[
        list[str] | None,
        typer.Option(
            "--owner",
            metavar="OWNER",
            help="Leave this owner out in turn; may be given several times; by default each.",
            autocompletion=complete_owner,
            show_default=False,
        ),
    ] = None,
    references: Annotated[
        int | None,
        typer.Option(
            "--references",
            min=1,
            help="Other secrets to rank a canary among; needs --canaries. [default: 255]",
            show_default=False,
        ),
    ] = None,
    prefix_tokens: Annotated[
        int | None,
        typer.Option(
            "--prefix-tokens",
            min=1,
            help="Tokens of a document that are given; needs --text. [default: 32]",
            show_default=False,
        ),
    ] = None,
    new_tokens: Annotated[
        int | None,
        typer.Option(
            "--new-tokens",
            min=1,
            help="Tokens of it that are asked for; needs --text. [default: 64]",
            show_default=False,
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(
            "--documents",
            min=1,
            help="At most so many documents; needs --text. [default: 64]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            "--samples",
            min=1,
            help="Draw so many continuations and keep the nearest; needs --text; by default the likeliest is taken.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of references and draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Rows run at once.")] = 16,
    device: DeviceOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Look for memorised text, with and without each owner.

    Checks the whole model, the model without each owner, and the anchor alone.

    Exposure says how far the model prefers a planted secret to others that could have been drawn, in bits: 1.4 on
    average is chance, the ceiling is certainty. A text is extracted if the model, given its beginning, writes the
    rest with a normalised edit distance of at most a tenth. Finding nothing proves nothing.
    """
    _check_options(
        canaries, text, references, (prefix_tokens, new_tokens, documents, samples), names=_TEXT_OPTIONS
    )
    store = open_registry(context, registry)

    from pipelines.memorization.canaries import read_canaries
    from pipelines.memorization.check import Checks, arms_of, check, text_cases
    from pipelines.train.windows import read_documents

    planted = read_canaries(canaries) if canaries else []
    texts = read_documents([text]) if text else []
    with (
        count_bar("Looking", unit="checks") as progress,
        open_folder(out, opt_out=(), registry=store, device=device) as (model, tokenizer),
    ):
        note_if_alone(model)
        checks = Checks(
            canaries=planted,
            references=references or REFERENCES,
            texts=text_cases(
                texts,
                tokenizer,
                prefix=prefix_tokens or PREFIX,
                new=new_tokens or NEW,
                limit=documents or DOCUMENTS,
            )
            if texts
            else (),
            samples=samples or 0,
            seed=seed,
            batch_size=batch_size,
        )
        arms = arms_of(model.owners, without=owner or ())
        reports = check(model, tokenizer, checks, arms=arms, progress=progress)
    if as_json:
        print_json({arm: report.to_dict() for arm, report in reports.items()})
        return
    if planted:
        _print_canaries(reports)
    if texts:
        if planted:
            print_line()
        _print_extraction(reports)


_TEXT_OPTIONS = ("--prefix-tokens", "--new-tokens", "--documents", "--samples")


def _check_options(
    canaries: Path | None,
    text: Path | None,
    references: int | None,
    of_text: tuple[int | None, ...],
    *,
    names: tuple[str, ...],
) -> None:
    """Refuse options that would have no effect."""
    if canaries is None and text is None:
        raise OptionError("There is nothing to look for. Give --canaries, --text, or both.")
    if canaries is None and references is not None:
        raise OptionError("--references has no effect without --canaries.")
    for name, value in zip(names, of_text, strict=True):
        if text is None and value is not None:
            raise OptionError(f"{name} has no effect without --text.")


def _print_canaries(reports: Mapping[str, ArmReport]) -> None:
    """Print each canary's exposure by arm; ``*`` marks those that the model writes down."""
    first = next(iter(reports.values()))
    headings = [_heading(arm) for arm in reports]
    rows: list[tuple[object, ...]] = [
        (
            number + 1,
            f"{first.canaries[number].ceiling:.1f}",
            *(
                f"{score.exposure:.1f}{'*' if score.extracted else ' '}"
                for score in (report.canaries[number] for report in reports.values())
            ),
        )
        for number in range(len(first.canaries))
    ]
    rows.append(("mean", None, *(f"{report.mean_exposure:.1f} " for report in reports.values())))
    print_table(
        rows,
        columns=("CANARY", "CEILING", *headings),
        empty="No canary.",
        right=("CEILING", *headings),
    )
    print_line("exposure in bits, 1.4 on average by chance; * the greedy continuation is the secret")


def _print_extraction(reports: Mapping[str, ArmReport]) -> None:
    from pipelines.memorization.extraction import clopper_pearson

    rows = []
    for arm, report in reports.items():
        trials = len(report.similarities)
        low, high = clopper_pearson(report.extracted, trials)
        rows.append(
            (
                arm,
                report.extracted,
                trials,
                f"{report.extracted / trials:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{max(report.similarities):.2f}",
            )
        )
    right = ("EXTRACTED", "TEXTS", "RATE", "95% INTERVAL", "NEAREST")
    print_table(rows, columns=("MODEL", *right), empty="No text.", right=right)


def _heading(arm: str) -> str:
    return arm.replace("composed-without:", "without ").upper()
