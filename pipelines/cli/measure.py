"""``coterie evaluate``: the loss of a composed folder on held-out text, and whom the text was routed to.

Knows how to name texts and print numbers; they are computed by ``pipelines.evaluate``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import DeviceOption, OptionError, open_folder
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json, print_line, print_table
from pipelines.cli.progress import count_bar

if TYPE_CHECKING:
    from pipelines.evaluate import Evaluation

__all__ = ["evaluate_folder"]

EXAMPLES = examples(
    "coterie evaluate composed --data law=law.jsonl --data code=code.jsonl",
    "coterie evaluate composed --data law=law.jsonl --opt-out acme --json",
    "coterie evaluate composed --data law=law.jsonl --data code=code.jsonl --leave-one-out",
)


def evaluate_folder(
    context: typer.Context,
    out: OutFolder,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="DOMAIN=FILE",
            help="Held-out text of a domain: .jsonl with a text field a line, or .txt; may be given several times.",
            show_default=False,
        ),
    ],
    opt_out: OptOutOption = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Measure the whole and, in turn, without each owner.")
    ] = False,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")
    ] = 128,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=0, help="At most about this many tokens of a domain; 0: all.")
    ] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Windows run at once.")] = 4,
    device: DeviceOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a composed model on held-out text.

    Shows the loss of each domain (nats per token, and bits per byte, which compares across domains) and the
    share of the routed weight that went to the anchor and to each owner.
    """
    if leave_one_out and opt_out:
        raise OptionError("--leave-one-out leaves each owner out in turn: give it without --opt-out.")
    files = _files(data)

    from pipelines.evaluate import evaluate, read_domains
    from pipelines.evaluate import leave_one_out as each_left_out

    texts = read_domains(files)
    store = open_registry(context, registry)
    size: dict[str, Any] = {
        "sequence_length": sequence_length,
        "max_tokens": max_tokens or None,
        "batch_size": batch_size,
    }
    with (
        count_bar("Evaluating", unit="tokens") as progress,
        open_folder(out, opt_out=opt_out or (), registry=store, device=device) as (model, tokenizer),
    ):
        if leave_one_out:
            arms = each_left_out(model, tokenizer, texts, progress=progress, **size)
        else:
            arms = {"composed": evaluate(model, tokenizer, texts, progress=progress, **size)}
    if as_json:
        left_out = sorted(_owners_of(out) - set(model.owners))
        rows = {arm: _plain(result, left_out) for arm, result in arms.items()}
        print_json(rows if leave_one_out else rows["composed"])
    elif leave_one_out:
        _print_arms(arms)
    else:
        _print_domains(arms["composed"])


def _files(data: Sequence[str]) -> dict[str, Path]:
    """Split ``DOMAIN=FILE`` and refuse a domain that is named twice."""
    files: dict[str, Path] = {}
    for given in data:
        domain, equals, file = given.partition("=")
        if not (domain and equals and file):
            raise OptionError(f"--data '{given}' is not of the form DOMAIN=FILE, for instance law=law.jsonl.")
        if domain in files:
            raise OptionError(f"--data names the domain '{domain}' twice. Put its text into one file.")
        files[domain] = Path(file)
    return files


def _owners_of(out: Path) -> set[str]:
    from composer.lock import Lock

    return set(Lock.read(out).owners)


def _plain(result: Evaluation, left_out: Sequence[str]) -> dict[str, Any]:
    """Return plain data in which owners left out at load are named and NaN is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {**finite(result.to_dict()), "opt_out": sorted({*result.opt_out, *left_out})}


def _print_domains(result: Evaluation) -> None:
    names = list(dict.fromkeys(name for score in result.domains.values() for name in score.routing))
    shares = [f"TO {name.upper()}" for name in names]
    print_table(
        [
            (
                domain,
                f"{score.nll:.3f}",
                f"{score.bits_per_byte:.3f}",
                score.tokens,
                f"{score.tokens_per_second:,.0f}",
                *(f"{score.routing[name]:.0%}" for name in names),
            )
            for domain, score in result.domains.items()
        ],
        columns=("DOMAIN", "NLL", "BITS/BYTE", "TOKENS", "TOKENS/S", *shares),
        empty="No domain.",
        right=("NLL", "BITS/BYTE", "TOKENS", "TOKENS/S", *shares),
    )
    print_line(f"mean NLL {result.mean_nll:.3f} nats per token")


def _print_arms(arms: Mapping[str, Evaluation]) -> None:
    domains = list(next(iter(arms.values())).domains)
    headings = [domain.upper() for domain in domains]
    print_table(
        [
            (arm, *(f"{result.domains[domain].nll:.3f}" for domain in domains), f"{result.mean_nll:.3f}")
            for arm, result in arms.items()
        ],
        columns=("NLL", *headings, "MEAN"),
        empty="No arm.",
        right=(*headings, "MEAN"),
    )
