"""``coterie attribute``: what each owner contributes to a prompt or to a given continuation of it.

Knows how to print shares and bars; they are computed by ``pipelines.attribution``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import DeviceOption, DtypeOption, OptionError, open_folder
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import note, print_json, print_line, print_table
from pipelines.cli.progress import count_bar

if TYPE_CHECKING:
    from pipelines.attribution import Attribution, Method

__all__ = ["attribute_request"]

EXAMPLES = examples(
    "coterie attribute composed --prompt 'The licensee shall' --continuation ' not sublicense the software.'",
    "coterie attribute composed --prompt 'The licensee shall not sublicense.' --method shapley --json",
    "echo 'def main():' | coterie attribute composed --prompt - --opt-out acme",
)

_BAR = 24
"""Widest bar, in characters."""


def attribute_request(
    context: typer.Context,
    out: OutFolder,
    prompt: Annotated[
        str,
        typer.Option("--prompt", metavar="TEXT", help="The request; - reads stdin.", show_default=False),
    ],
    continuation: Annotated[
        str | None,
        typer.Option(
            "--continuation",
            metavar="TEXT",
            help="What is attributed; by default the prompt itself, from its second token on.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="mass, leave-one-out or shapley; may be given several times; by default all of them.",
            show_default=False,
        ),
    ] = None,
    opt_out: OptOutOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attribute a text's likelihood to the owners.

    mass is the owner's share of the routed weight; leave-one-out what the log-likelihood loses (in nats) when the
    owner is left out; shapley the owner's mean gain over all orders in which the owners can join: these add up to
    what all of them gain over the anchor. shapley runs the model for every subset of at most 8 owners.
    """
    methods = _methods(method)
    text = sys.stdin.read() if prompt == "-" else prompt
    store = open_registry(context, registry)

    from pipelines.attribution import attribute, tokenize

    with (
        count_bar("Attributing", unit="sets of owners") as progress,
        open_folder(out, opt_out=opt_out or (), registry=store, device=device, dtype=dtype) as (
            model,
            tokenizer,
        ),
    ):
        ids, given = tokenize(tokenizer, text, continuation)
        chosen = methods or _affordable(len(model.owners))
        result = attribute(model, ids, given, methods=chosen, progress=progress)
    if as_json:
        print_json(_plain(result, text, continuation))
    else:
        _print(result, of="prompt" if continuation is None else "continuation")


def _methods(given: list[str] | None) -> list[Method]:
    from experts.names import unknown_name
    from pipelines.attribution import METHODS

    for name in given or ():
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    if given and len(set(given)) < len(given):
        raise OptionError("--method names a method twice. Give each once.")
    return [method for method in METHODS if method in (given or ())]


def _affordable(owners: int) -> list[Method]:
    """All methods, or without Shapley values where there are too many owners for them."""
    from pipelines.attribution import MAX_SHAPLEY_OWNERS, METHODS

    if owners <= MAX_SHAPLEY_OWNERS:
        return list(METHODS)
    note(
        f"Note: no Shapley values, which are exact for at most {MAX_SHAPLEY_OWNERS} owners; here are {owners}."
    )
    return [method for method in METHODS if method != "shapley"]


def _plain(result: Attribution, prompt: str, continuation: str | None) -> dict[str, Any]:
    figures = _figures(result)
    owners: dict[str, dict[str, float]] = {owner: {} for owner in result.owners}
    for name, values in figures.items():
        for owner, row in owners.items():
            row[name.replace("-", "_")] = values[owner]
    return {
        "prompt": prompt,
        "continuation": continuation,
        "tokens": result.tokens,
        "log_likelihood": result.with_all,
        "log_likelihood_of_anchor": result.with_none,
        "anchor_mass": None if result.mass is None else result.mass["anchor"],
        "owners": owners,
    }


def _figures(result: Attribution) -> dict[str, Mapping[str, float]]:
    """The methods that were run, in their order."""
    every = {"mass": result.mass, "leave-one-out": result.leave_one_out, "shapley": result.shapley}
    return {name: values for name, values in every.items() if values is not None}


def _print(result: Attribution, *, of: str) -> None:
    figures = _figures(result)
    last = list(figures)[-1]
    bars = _bars({owner: figures[last][owner] for owner in result.owners})
    forms = {name: ".1%" if name == "mass" else "+.3f" for name in figures}
    rows = [
        (owner, *(format(values[owner], forms[name]) for name, values in figures.items()), bars[owner])
        for owner in result.owners
    ]
    if result.mass is not None:
        anchor = [format(result.mass["anchor"], ".1%"), *[None] * (len(figures) - 1)]
        rows.append(("anchor", *anchor, ""))  # type: ignore[arg-type]
    headings = [name.upper() for name in figures]
    print_table(rows, columns=("OWNER", *headings, ""), empty="No owner.", right=headings)
    gain = result.with_all - result.with_none
    print_line(
        f"log-likelihood of the {of}'s {result.tokens} tokens: {result.with_all:.3f} nats, "
        f"{result.with_none:.3f} with the anchor alone ({gain:+.3f})"
    )


def _bars(values: Mapping[str, float]) -> dict[str, str]:
    """Draw each value as a bar from a common zero; negative ones go to the left of it."""
    low, high = min(0.0, *values.values()), max(0.0, *values.values())
    scale = _BAR / ((high - low) or 1.0)
    left = round(-low * scale)
    block = _block()
    bars = {}
    for name, value in values.items():
        length = round(abs(value) * scale)
        if value < 0:
            bars[name] = " " * (left - length) + block * length + "|"
        else:
            bars[name] = " " * left + "|" + block * length
    return bars


def _block() -> str:
    try:
        "█".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return "#"
    return "█"
