"""``coterie list``, ``show`` and ``verify``: the experts of a registry on the command line.

Knows how to turn records and cards into rows and blocks; storage and checks are the registry's business.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipelines.cli.errors import FAILURE
from pipelines.cli.loading import OptionError
from pipelines.cli.options import (
    ExpertArgument,
    JsonOption,
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

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from registry import ExpertRecord, FileCheck, Registry

__all__ = ["list_experts", "record_row", "show", "verify"]

LIST_EXAMPLES = examples(
    "coterie list", "coterie list --domain law --json", "coterie list --owner acme --all-versions"
)
SHOW_EXAMPLES = examples("coterie show acme/contracts", "coterie show acme/contracts@1 --json")
VERIFY_EXAMPLES = examples(
    "coterie verify", "coterie verify acme/contracts@1 --json", "coterie verify --rebuild"
)


def record_row(record: ExpertRecord) -> dict[str, Any]:
    """Return what ``--json`` says of an expert wherever one is listed."""
    return {
        "name": record.name,
        "version": record.version,
        "owner": record.owner,
        "domain": record.domain,
        "kind": record.kind,
        "license": record.license,
        "base": record.base_name,
        "base_fingerprint": record.base_fingerprint,
        "parameters": record.parameters,
        "bytes": record.bytes,
        "digest": record.digest,
        "created": record.created,
        "opted_out": record.opted_out,
    }


def list_experts(
    context: typer.Context,
    domain: Annotated[
        str | None, typer.Option("--domain", help="Only this domain.", show_default=False)
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option("--owner", help="Only this owner's.", autocompletion=complete_owner, show_default=False),
    ] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Only this kind: lora or ffn.", show_default=False)
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Only experts of this base.", show_default=False)
    ] = None,
    all_versions: Annotated[bool, typer.Option("--all-versions", help="Older versions too.")] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the experts of the registry.

    The newest version of each is shown; those of owners who have opted out are marked.
    """
    store = open_registry(context, registry)
    records = store.experts(domain=domain, owner=owner, kind=kind, base=base, all_versions=all_versions)
    if as_json:
        print_json([record_row(record) for record in records])
        return
    print_table(
        [
            (
                f"{record.name}@{record.version}",
                record.domain,
                record.kind,
                record.license,
                record.base_name,
                human_count(record.parameters),
                human_bytes(record.bytes),
                "opted out" if record.opted_out else "",
            )
            for record in records
        ],
        columns=("EXPERT", "DOMAIN", "KIND", "LICENSE", "BASE", "PARAMETERS", "SIZE", "CONSENT"),
        empty="No expert matches."
        if any((domain, owner, kind, base))
        else f"There is no expert in the registry '{store.path}' yet.",
        right=("PARAMETERS", "SIZE"),
    )


def show(
    context: typer.Context,
    expert: ExpertArgument,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one expert's card: licence, base, training, files."""
    store = open_registry(context, registry)
    record = store.expert(expert)
    card = store.card(record)
    parents = _parents(store, card)
    if as_json:
        row = {**record_row(record), "parent_owners": list(parents)}
        print_json({**row, "card": card.model_dump(mode="json")})
        return
    out = {entry.owner for entry in store.opt_outs()}
    print_fields(_card_fields(record, card, parents=parents, out=out))


def _parents(store: Registry, card: ExpertCard) -> tuple[str, ...]:
    """Return the other owners of what the expert was made from; a registry that lacks them is told of, and shown."""
    from experts.errors import RegistryError

    try:
        return store.parent_owners(card)
    except RegistryError as error:
        note(f"Note: {error}")
        return ()


def _card_fields(
    record: ExpertRecord, card: ExpertCard, *, parents: Sequence[str], out: Collection[str]
) -> dict[str, object]:
    marked = {owner: owner + (" (opted out)" if owner in out else "") for owner in (record.owner, *parents)}
    return {
        "expert": f"{record.name}@{record.version}",
        "owner": marked[record.owner],
        "parent owners": [marked[owner] for owner in parents] or None,
        "domain": record.domain,
        "description": card.description or None,
        "license": record.license,
        "kind": record.kind,
        "layers": layer_ranges(card.layers),
        "rank": card.rank,
        "parameters": human_count(record.parameters),
        "size": human_bytes(record.bytes),
        "opt-out class": card.optout_class,
        "registered": record.created,
        "digest": record.digest,
        "base": {
            "name": card.base.name,
            "revision": card.base.revision,
            "fingerprint": card.base.fingerprint,
            **({"embedding": card.base.embedding.model_dump()} if card.base.embedding else {}),
        },
        "training": {
            "method": card.training.method,
            "tokens": card.training.tokens,
            "steps": card.training.steps,
            "seconds": card.training.seconds,
            "privacy": _without_none(card.training.privacy.model_dump()) if card.training.privacy else None,
            "data": card.training.data_statement or None,
            "settings": dict(card.training.settings),
        },
        "routing": _without_none(card.routing.model_dump()) if card.routing else None,
        "metrics": dict(card.metrics),
        "terms": _without_none(card.terms.model_dump()),
        "derived from": list(card.derived_from) or None,
        "files": {file.path: f"{human_bytes(file.size)}, sha256 {file.sha256}" for file in card.files},
    }


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    inner = {key: _without_none(value) if isinstance(value, dict) else value for key, value in fields.items()}
    return {key: value for key, value in inner.items() if value not in (None, (), [], {})}


def layer_ranges(layers: Sequence[int]) -> str:
    """Shorten ascending numbers: ``0, 15-29``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(str(end) for end in run) for run in runs) or "-"


def verify(
    context: typer.Context,
    expert: Annotated[
        str | None,
        typer.Argument(
            metavar="[EXPERT]", help="By default every expert and every base.", show_default=False
        ),
    ] = None,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="First recreate a lost or damaged index from the log's files and the blobs."
        ),
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare every stored file with its digest.

    Exits with 1 where a file is missing or altered. Without EXPERT, the index and the audit log are checked
    against each other as well. With --rebuild, a change whose process was stopped between writing its log entry and
    its commit takes effect; where the log's files or the blobs are damaged too, nothing is changed.
    """
    if rebuild and expert is not None:
        raise OptionError("--rebuild recreates the whole index: give it without EXPERT.")
    store = open_registry(context, registry)
    problems: tuple[str, ...] = ()
    if expert is not None:
        files = store.verify(expert).files
    else:
        report = store.fsck(rebuild=rebuild)
        files, problems = report.files.files, report.problems
    damaged = [check for check in files if check.status != "ok"]
    intact = not damaged and not problems
    if as_json:
        print_json(
            {"ok": intact, "files": [_check_row(check) for check in files], "problems": list(problems)}
        )
    elif intact:
        done = "The index was rebuilt. " if rebuild else ""
        print_line(f"{done}{len(files)} files checked: all are intact.")
    else:
        print_table(
            [(check.status, check.subject, check.path) for check in damaged],
            columns=("STATUS", "SUBJECT", "FILE"),
            empty="All files are intact.",
        )
        for problem in problems:
            print_line(f"problem: {problem}")
    if not intact:
        note(
            f"Error: {len(damaged)} of {len(files)} files are damaged, {len(problems)} contradictions found."
        )
        raise typer.Exit(FAILURE)


def _check_row(check: FileCheck) -> dict[str, str]:
    return {"subject": check.subject, "path": check.path, "sha256": check.sha256, "status": check.status}
