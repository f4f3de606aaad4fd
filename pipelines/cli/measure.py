"""``coterie evaluate``: the loss of a composed folder on held-out text, and whom the text was routed to.

Knows how to name texts and print numbers; they are computed by ``pipelines.evaluate``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.loading import (
    DeviceOption,
    DtypeOption,
    OptionError,
    dtype_name,
    note_if_alone,
    open_folder,
)
from pipelines.cli.options import JsonOption, OptOutOption, OutFolder, RegistryOption, examples, open_registry
from pipelines.cli.output import print_json, print_line, print_table
from pipelines.cli.progress import count_bar
from pipelines.cli.windows import (
    BatchSizeOption,
    DataOption,
    MaxTokensOption,
    SequenceLengthOption,
    domain_files,
)

if TYPE_CHECKING:
    from pipelines.evaluate import DomainScore, Evaluation

__all__ = ["evaluate_folder"]

EXAMPLES = examples(
    "coterie evaluate composed --data law=law.jsonl --data code=code.jsonl",
    "coterie evaluate composed --data law=law.jsonl --opt-out acme --json",
    "coterie evaluate composed --data law=law.jsonl --data code=code.jsonl --leave-one-out",
    "coterie evaluate retriever --data med=collections/med",
    "coterie evaluate composed --data law=law.jsonl --data news=news.txt --domain-owner news=anchor --heatmap who.png",
)

Owners = Mapping[str, Sequence[str]]
"""Owners by domain."""


def evaluate_folder(
    context: typer.Context,
    out: OutFolder,
    data: DataOption,
    opt_out: OptOutOption = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="Measure the whole and, in turn, without each owner.")
    ] = False,
    domain_owner: Annotated[
        list[str] | None,
        typer.Option(
            "--domain-owner",
            metavar="DOMAIN=OWNER",
            help="Whose a domain is, for the routing accuracy; by default that of the experts' cards, and 'anchor' "
            "says nobody's; may be given several times.",
            show_default=False,
        ),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            "--heatmap",
            metavar="PNG",
            help="Draw each domain's routed weight by owner into this picture.",
            show_default=False,
        ),
    ] = None,
    sequence_length: SequenceLengthOption = 128,
    max_tokens: MaxTokensOption = 4096,
    batch_size: BatchSizeOption = 4,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a composed model on held-out text.

    Shows, for each domain: the loss (nats per token, and bits per byte, which compares across domains); the routing
    accuracy, the share of the tokens whose largest routed weight is that of the domain's owner; the router's
    entropy in nats (0 is certainty); the share of the routed weight that went to the anchor and to each owner; and
    the share of the tokens that use each expert at all. With --leave-one-out: the losses without each owner, and
    by how much they differ from the whole.

    For a composed retriever: nDCG@10, recall and MRR on each test collection; by how much nDCG@10 differs from the
    base's, with a bootstrap interval and the p-value of a paired randomisation test; and who answered. --opt-out
    leaves out the owner's documents too, as a search does, and queries that only they answer; --leave-one-out leaves
    out experts alone, so that all arms rank the same documents.
    """
    if leave_one_out and opt_out:
        raise OptionError("--leave-one-out leaves each owner out in turn: give it without --opt-out.")
    files = domain_files(data)
    if heatmap is not None and (heatmap.suffix != ".png" or not heatmap.absolute().parent.is_dir()):
        raise OptionError(f"--heatmap {heatmap} is not a .png file in a folder that exists.")

    from composer.lock import Lock
    from pipelines.ownership import domain_owners

    lock = Lock.read(out)
    if lock.recipe == "router_retriever":
        from pipelines.cli.measure_retrieval import evaluate_retriever, refuse_idle_options

        refuse_idle_options(
            domain_owner=domain_owner, sequence_length=sequence_length != 128, max_tokens=max_tokens != 4096
        )
        evaluate_retriever(
            out,
            lock,
            files,
            opt_out=opt_out or (),
            leave_one_out=leave_one_out,
            heatmap=heatmap,
            batch_size=batch_size,
            device=device,
            registry=open_registry(context, registry),
            as_json=as_json,
        )
        return
    owners = domain_owners(lock, files, given=_given_owners(domain_owner or ()))

    from composer.loading import left_out
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
        open_folder(out, opt_out=opt_out or (), registry=store, device=device, dtype=dtype) as (
            model,
            tokenizer,
        ),
    ):
        note_if_alone(model)
        if leave_one_out:
            arms = each_left_out(model, tokenizer, texts, progress=progress, **size)
        else:
            arms = {"composed": evaluate(model, tokenizer, texts, progress=progress, **size)}
    without = sorted(left_out(lock, opt_out or (), store))
    if heatmap is not None:
        _draw(arms["composed"], heatmap)
    if as_json:
        rows = {arm: _plain(result, without, owners, arms["composed"]) for arm, result in arms.items()}
        rows = {arm: {**row, "dtype": dtype_name(model)} for arm, row in rows.items()}
        print_json(rows if leave_one_out else rows["composed"])
    elif leave_one_out:
        _print_arms(arms)
    else:
        _print_domains(arms["composed"], owners)
        _print_load(arms["composed"])


def _draw(result: Evaluation, path: Path) -> None:
    from pipelines.charts import draw_routing

    routing = {domain: score.routing for domain, score in result.domains.items()}
    beside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    try:
        draw_routing(routing, beside, title="Who a domain is routed to").replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _given_owners(pairs: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Collect ``DOMAIN=OWNER``; a domain named several times has several owners."""
    owners: dict[str, tuple[str, ...]] = {}
    for pair in pairs:
        domain, equals, owner = pair.partition("=")
        if not (domain and equals and owner):
            raise OptionError(
                f"--domain-owner '{pair}' is not of the form DOMAIN=OWNER, for instance law=acme."
            )
        owners[domain] = (*owners.get(domain, ()), owner)
    return owners


def _accuracies(result: Evaluation, owners: Owners) -> dict[str, float | None]:
    """Routing accuracy by domain; None where no owner of the domain is in the model."""
    from pipelines.ownership import routing_accuracy

    return {
        domain: routing_accuracy(score.sent, set(owners[domain]) - set(result.opt_out))
        for domain, score in result.domains.items()
    }


def _plain(result: Evaluation, left_out: Sequence[str], owners: Owners, whole: Evaluation) -> dict[str, Any]:
    """Return plain data in which owners left out at load are named and NaN is null."""
    from pipelines.ownership import mean_accuracy

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    accuracies = _accuracies(result, owners)
    row = result.to_dict()
    for domain, score in row["domains"].items():
        score |= {"owners": list(owners[domain]), "routing_accuracy": accuracies[domain]}
        if result is not whole:
            score["nll_change"] = score["nll"] - whole.domains[domain].nll
    row |= {
        "opt_out": sorted({*result.opt_out, *left_out}),
        "mean_routing_accuracy": mean_accuracy(accuracies),
    }
    if result is not whole:
        row["mean_nll_change"] = result.mean_nll - whole.mean_nll
    plain: dict[str, Any] = finite(row)
    return plain


def _print_domains(result: Evaluation, owners: Owners) -> None:
    from pipelines.ownership import mean_accuracy

    names = list(dict.fromkeys(name for score in result.domains.values() for name in score.routing))
    shares = [f"TO {name.upper()}" for name in names]
    accuracies = _accuracies(result, owners)
    print_table(
        [
            (
                domain,
                *_losses(score),
                _percent(accuracies[domain]),
                None if score.router_entropy is None else f"{score.router_entropy:.3f}",
                *(_percent(score.routing[name]) for name in names),
            )
            for domain, score in result.domains.items()
        ],
        columns=("DOMAIN", *_LOSSES, "ACCURACY", "ENTROPY", *shares),
        empty="No domain.",
        right=(*_LOSSES, "ACCURACY", "ENTROPY", *shares),
    )
    mean = mean_accuracy(accuracies)
    accuracy = "" if mean is None else f", mean routing accuracy {mean:.1%}"
    print_line(f"mean NLL {result.mean_nll:.3f} nats per token{accuracy}")


_LOSSES = ("NLL", "BITS/BYTE", "TOKENS", "TOKENS/S")


def _losses(score: DomainScore) -> tuple[str, str, int, str]:
    return f"{score.nll:.3f}", f"{score.bits_per_byte:.3f}", score.tokens, f"{score.tokens_per_second:,.0f}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _print_load(result: Evaluation) -> None:
    """Print the share of each domain's tokens that use each expert; nothing for a plain model."""
    loads = {domain: score.load for domain, score in result.domains.items()}
    experts = list(next(iter(loads.values())))
    if not experts:
        return
    print_line()
    headings = [domain.upper() for domain in loads]
    print_table(
        [(expert, *(_percent(load[expert]) for load in loads.values())) for expert in experts],
        columns=("TOKENS THAT USE", *headings),
        empty="No expert.",
        right=headings,
    )


def _print_arms(arms: Mapping[str, Evaluation]) -> None:
    domains = list(next(iter(arms.values())).domains)
    headings = [domain.upper() for domain in domains]
    whole = arms["composed"]

    def row(arm: str, result: Evaluation, of: Evaluation | None, form: str) -> tuple[str, ...]:
        less = [0.0] * len(domains) if of is None else [of.domains[domain].nll for domain in domains]
        losses = [result.domains[domain].nll - nll for domain, nll in zip(domains, less, strict=True)]
        mean = result.mean_nll - (0.0 if of is None else of.mean_nll)
        return arm, *(format(loss, form) for loss in losses), format(mean, form)

    print_table(
        [row(arm, result, None, ".3f") for arm, result in arms.items()],
        columns=("NLL", *headings, "MEAN"),
        empty="No arm.",
        right=(*headings, "MEAN"),
    )
    print_line()
    print_table(
        [row(arm, result, whole, "+.3f") for arm, result in arms.items() if result is not whole],
        columns=("CHANGE OF THE NLL", *headings, "MEAN"),
        empty="No owner.",
        right=(*headings, "MEAN"),
    )
