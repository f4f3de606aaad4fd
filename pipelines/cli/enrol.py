"""``coterie register``: from an expert's folder to the registry.

Knows how to complete a folder with a card from the options; checks and storage are done by ``experts`` and
``registry``.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from experts.errors import CoterieError
from experts.names import check_expert_name, unknown_name
from pipelines.cli.catalog import record_row
from pipelines.cli.errors import writing_to
from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import human_bytes, human_count, note, print_json, print_line

if TYPE_CHECKING:
    from experts.card import ExpertCard
    from experts.routing_artifacts import RoutingInfo
    from registry import BaseRecord, Registry

__all__ = ["register", "remarks_noted"]

EXAMPLES = examples(
    "coterie register trained/acme/contracts",
    "coterie register ./adapter --name acme/contracts --domain law --license Apache-2.0",
    "coterie register ./adapter --name acme/contracts --domain law --license MIT --text own.jsonl",
    "coterie register ./adapter --name acme/contracts --domain law --license MIT --dry-run",
)


class RegisterError(CoterieError):
    """The options do not fit the folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """What the options say about the expert; None: not said."""

    name: str | None
    owner: str | None
    domain: str | None
    license: str | None
    base: str | None
    version: int | None
    description: str | None


def register(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH",
            help="A PEFT adapter folder, a folder with ffn.safetensors, a whole fine-tuned model (config.json and "
            "model.safetensors or shards), or a folder that 'coterie train' wrote.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="OWNER/EXPERT", help="The expert's name.", show_default=False),
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option("--owner", help="The owner: the first part of the name.", show_default=False),
    ] = None,
    domain: Annotated[
        str | None, typer.Option("--domain", help="What it knows about, in a word.", show_default=False)
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license",
            metavar="SPDX",
            help="Licence of the weights, as an SPDX expression.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="NAME",
            help="The base it belongs to; needless where there is one.",
            show_default=False,
        ),
    ] = None,
    version: Annotated[
        int | None,
        typer.Option(
            "--version", min=1, metavar="N", help="The version; by default the next.", show_default=False
        ),
    ] = None,
    description: Annotated[
        str | None, typer.Option("--description", help="A sentence for the card.", show_default=False)
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="The owner's text, of which additive statistics are published so that a router can be solved; "
            "the text itself is not. May be given several times.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and register nothing.")
    ] = False,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check an expert's folder and add it to the registry.

    A folder that 'coterie train' wrote carries its card, so it needs no option. For any other folder give
    --name, --domain and --license: a card is made, and the folder itself stays as it is.
    """
    store = open_registry(context, registry)
    wanted = _Wanted(
        name=name,
        owner=owner,
        domain=domain,
        license=license,
        base=base,
        version=version,
        description=description,
    )
    with _packed(path, store=store, wanted=wanted, text=text or []) as (folder, card):
        if dry_run:
            _rehearse(folder, card, store=store, as_json=as_json)
            return
        record = store.register(folder)
    if as_json:
        print_json(record_row(record))
        return
    print_line(
        f"Registered {record.name}@{record.version}: {record.domain}, {record.kind}, {record.license}, "
        f"{human_count(record.parameters)} parameters, {human_bytes(record.bytes)}, digest {record.digest[:12]}."
    )


def _rehearse(folder: Path, card: ExpertCard, *, store: Registry, as_json: bool) -> None:
    """Check what registering would check, and say so."""
    from experts.admission import check_expert

    base = _base(store, card.base.name)
    summary = check_expert(folder, card, base.description)
    if as_json:
        print_json({"dry_run": True, "digest": card.digest, "card": card.model_dump(mode="json")})
        return
    print_line(
        f"{card.name}@{card.version} would be accepted: {summary.kind}, {human_count(summary.parameters)} parameters, "
        f"{human_bytes(summary.bytes)}. Nothing was registered (dry run)."
    )


@contextmanager
def _packed(
    path: Path, *, store: Registry, wanted: _Wanted, text: list[Path]
) -> Iterator[tuple[Path, ExpertCard]]:
    """Yield a folder with a card, made in a temporary place where ``path`` has none or another version is wanted."""
    from experts.card import CARD_FILE
    from experts.package import read_package

    with tempfile.TemporaryDirectory(prefix="coterie-register-") as scratch, writing_to(Path(scratch)):
        if not path.is_dir():
            raise RegisterError(f"There is no folder '{path}'.")
        if not (path / CARD_FILE).exists():
            staging = Path(scratch) / "package"
            yield staging, _pack(path, staging, store=store, wanted=wanted, text=text)
            return
        card = read_package(path)
        _check_options(card, wanted)
        if text:
            raise RegisterError(f"'{path}' carries its card, which says what it publishes: leave --text out.")
        if wanted.version in (None, card.version):
            yield path, card
            return
        yield _renumbered(path, card, Path(scratch) / "package", version=wanted.version)


def _check_options(card: ExpertCard, wanted: _Wanted) -> None:
    """Refuse options that contradict the card instead of letting one of the two win silently."""
    told = {
        "--name": (wanted.name, card.name),
        "--owner": (wanted.owner, card.owner),
        "--domain": (wanted.domain, card.domain),
        "--license": (wanted.license, card.license),
        "--base": (wanted.base, card.base.name),
        "--description": (wanted.description, card.description),
    }
    problems = [
        f"{option} is '{given}', the card says '{found}'"
        for option, (given, found) in told.items()
        if given is not None and given != found
    ]
    if problems:
        raise RegisterError("The options contradict the folder's card. Leave them out:", problems=problems)


def _renumbered(
    path: Path, card: ExpertCard, staging: Path, *, version: int | None
) -> tuple[Path, ExpertCard]:
    from experts.card import CARD_FILE, ExpertCard

    staging.mkdir()
    for file in card.files:
        shutil.copyfile(path / file.path, staging / file.path, follow_symlinks=False)
    changed = ExpertCard.create(**{**card.model_dump(mode="json"), "version": version})
    (staging / CARD_FILE).write_bytes(changed.to_bytes())
    return staging, changed


def _pack(path: Path, staging: Path, *, store: Registry, wanted: _Wanted, text: list[Path]) -> ExpertCard:
    from experts.package import pack

    name, domain, license = _required(wanted, path)
    base = _base(store, wanted.base)
    source, routing = path, None
    if text and _plain(path):  # anything else is refused by packing, which names every offender
        source, routing = _with_statistics(path, staging.parent, base=base, store=store, text=text)
    with remarks_noted():
        card = pack(
            source,
            staging,
            name=name,
            version=wanted.version or store.next_version(name),
            domain=domain,
            license=license,
            base=base.description,
            base_ref=base.ref,
            routing=routing,
            description=wanted.description or "",
        )
    if not text:
        note(
            "Note: without --text the expert publishes no statistics, so only routers that need none can reach it."
        )
    return card


@contextmanager
def remarks_noted() -> Iterator[None]:
    """Print what packing remarks about an expert as a note."""
    from experts.errors import ExpertWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExpertWarning)
        yield
    for warning in caught:
        note(f"Warning: {warning.message}")


def _plain(folder: Path) -> bool:
    """Whether the folder holds nothing but regular files, and links where its kind of expert may have them."""
    from experts.kinds import KINDS, get_kind

    forms = [form for name in KINDS for form in get_kind(name).forms if form.detect(folder)]
    linked = any(form.links_allowed for form in forms)
    skipped = {name for form in forms for name in form.folders_left_behind}
    modes = [
        (entry.stat() if linked else entry.lstat()).st_mode
        for entry in folder.iterdir()
        if entry.name not in skipped
    ]
    return all(map(stat.S_ISREG, modes))


def _required(wanted: _Wanted, path: Path) -> tuple[str, str, str]:
    missing = [
        option
        for option, value in (
            ("--name", wanted.name),
            ("--domain", wanted.domain),
            ("--license", wanted.license),
        )
        if value is None
    ]
    if missing or wanted.name is None or wanted.domain is None or wanted.license is None:
        raise RegisterError(f"'{path}' carries no card (card.json). Give {', '.join(missing)} to make one.")
    owner = check_expert_name(wanted.name).partition("/")[0]
    if wanted.owner is not None and wanted.owner != owner:
        raise RegisterError(
            f"--owner is '{wanted.owner}', but the name '{wanted.name}' belongs to '{owner}'."
        )
    return wanted.name, wanted.domain, wanted.license


def _base(store: Registry, name: str | None) -> BaseRecord:
    """Return the base of that name, or the only one."""
    known = store.bases()
    if name is None and len(known) == 1:
        return known[0]
    names = [base.name for base in known]
    advice = "Add one with 'coterie base add PATH --name NAME'."
    if name is not None and name not in names:
        raise unknown_name("base", name, names, advice=advice)
    if name is None:
        if not names:
            raise RegisterError(f"The registry has no base yet. {advice}")
        raise RegisterError(
            f"The registry has {len(names)} bases: {', '.join(sorted(names))}. Name one with --base."
        )
    return store.base(name)


def _with_statistics(
    path: Path, scratch: Path, *, base: BaseRecord, store: Registry, text: list[Path]
) -> tuple[Path, RoutingInfo]:
    """Put statistics of ``text`` beside the raw folder's files, taken where the base's public ones are.

    The files are copied, unless the kind allows links: a whole model is not copied to be copied again.
    """
    from experts.kinds import detect_kind
    from experts.routing_artifacts import RoutingInfo
    from pipelines.train import public_routing
    from pipelines.train.anchor import resolve_base
    from pipelines.train.retrieval_routing import query_routing
    from pipelines.train.routing import INFO_FILE
    from pipelines.train.windows import read_documents

    documents = read_documents(text)
    raw = scratch / "raw"
    kind = detect_kind(path, embeds=base.description.embedding is not None)
    kind.check_raw(path, base.description, base.ref)  # by the folder's own name, and before the text is read
    shutil.copytree(path.resolve(), raw, copy_function=os.symlink if kind.links_allowed else shutil.copy2)
    public = base.routing.statistics if base.routing else None
    layer = (
        public.layer
        if public
        else min(kind.layers(kind.read_config(raw / kind.config_file), base.description))
    )
    out = scratch / "routing"
    with resolve_base(base.name, registry=store) as resolved:
        if kind.embeds:
            made = query_routing(resolved, documents, out=out, layer=layer)
        else:
            normalization = public.normalization if public else "rms"
            made = public_routing(resolved, documents, out=out, layer=layer, normalization=normalization)
    info = RoutingInfo.model_validate_json((made / INFO_FILE).read_bytes())
    info = info.model_copy(update={"anchor": None})  # the card says it
    shutil.copyfile(made / info.file, raw / info.file)
    return raw, info
