"""``coterie index`` and ``coterie search``: documents as vectors on disk, and who answers a query with what.

Knows how documents are named and results shown; indexes and models are ``pipelines.retrieval``'s.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from pipelines.cli.errors import writing_to
from pipelines.cli.loading import DeviceOption, OptionError, quiet_transformers
from pipelines.cli.options import JsonOption, RegistryOption, examples, open_registry
from pipelines.cli.output import human_bytes, note, print_fields, print_json, print_line, print_table
from pipelines.cli.progress import count_bar

if TYPE_CHECKING:
    from pipelines.retrieval.collection import Document
    from pipelines.retrieval.encoders import Encoder, Route
    from pipelines.retrieval.index import Index
    from pipelines.retrieval.search import Hit, Vectors
    from registry import Registry

__all__ = ["SEARCH_EXAMPLES", "group", "search"]

_PART = 512
"""Documents encoded between two steps of the bar, sorted by length among themselves."""


class _IndexGroup(TyperGroup):
    """``coterie index OUT ...`` is ``coterie index build OUT ...``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put ``build`` in front where no other command stands."""
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["build", *args]
        return super().parse_args(ctx, args)


group = typer.Typer(
    cls=_IndexGroup,
    help="Index documents for exact search.\n\n'coterie index OUT' means 'coterie index build OUT'.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples(
        "coterie index manuals --model composed --corpus manuals.jsonl",
        "coterie index add manuals --model composed --corpus more.jsonl",
        "coterie index remove manuals --owner acme",
        "coterie index show manuals",
    ),
)

IndexArgument = Annotated[
    Path, typer.Argument(metavar="INDEX", help="A folder that 'coterie index' wrote.", show_default=False)
]
ModelOption = Annotated[
    Path,
    typer.Option(
        "--model",
        "--base",
        metavar="FOLDER",
        help="A composed retriever, or the sentence-transformers folder of its base: documents are always encoded by "
        "the base.",
        show_default=False,
    ),
]
CorpusOption = Annotated[
    list[Path],
    typer.Option(
        "--corpus",
        metavar="FILE",
        help='.jsonl with an object a line: "_id", "text", and maybe "title" and "owner"; may be given several times.',
        show_default=False,
    ),
]
OwnerOption = Annotated[
    str | None,
    typer.Option("--owner", help="Whose documents these are, where a line does not say.", show_default=False),
]
BatchOption = Annotated[int, typer.Option("--batch-size", min=1, help="Documents encoded at once.")]


@group.command(
    "build", epilog=examples("coterie index build manuals --model composed --corpus manuals.jsonl")
)
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    model: ModelOption,
    corpus: CorpusOption,
    owner: OwnerOption = None,
    backend: Annotated[
        Literal["exact", "faiss"], typer.Option("--backend", help="'faiss' needs the extra of that name.")
    ] = "exact",
    batch_size: BatchOption = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Encode documents by the base and write an index of them.

    The index remembers which base encoded it, and whose every document is. It does not depend on the experts: they
    may come and go without it being made again.
    """
    from pipelines.retrieval.index import check_new, create_index

    check_new(out)
    documents = _documents(corpus, owner)
    with _encoder(model, device=device) as encoder, writing_to(out):
        index = create_index(out, base=encoder.base, dimension=encoder.dimension, backend=backend)
        try:
            _fill(index, encoder, documents, out=out, batch_size=batch_size, as_json=as_json)
        except BaseException:
            if not any(out.iterdir()):
                out.rmdir()
            raise


@group.command("add", epilog=examples("coterie index add manuals --model composed --corpus more.jsonl"))
def add(
    out: IndexArgument,
    model: ModelOption,
    corpus: CorpusOption,
    owner: OwnerOption = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Let documents take the place of those with the same id.")
    ] = False,
    batch_size: BatchOption = 32,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Add documents to an index.

    All of them are in it when the command ends, or none.
    """
    from pipelines.retrieval.index import open_index

    index = open_index(out)
    documents = _documents(corpus, owner)
    double = sorted({document.id for document in documents}.intersection(index.ids))
    if double and not replace:
        raise OptionError(
            f"{len(double)} of these documents are in the index already, '{double[0]}' for one. Give --replace to put "
            "these in their places."
        )
    with _encoder(model, device=device) as encoder, writing_to(out):
        index = open_index(out, base=encoder.base)
        if double:
            index.remove(double)
        _fill(index, encoder, documents, out=out, batch_size=batch_size, as_json=as_json)


@group.command("remove", epilog=examples("coterie index remove manuals --owner acme --id 12"))
def remove(
    out: IndexArgument,
    ids: Annotated[
        list[str] | None,
        typer.Option("--id", help="Remove this document; may be given several times.", show_default=False),
    ] = None,
    owners: Annotated[
        list[str] | None,
        typer.Option(
            "--owner", help="Remove all of this owner's; may be given several times.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Remove documents from an index.

    Their vectors and ids leave its files too.
    """
    from experts.names import unknown_name
    from pipelines.retrieval.index import open_index

    if not ids and not owners:
        raise OptionError("Say what to remove: --id or --owner.")
    index = open_index(out)
    known = {owner for owner in index.owners if owner}
    for owner in owners or ():
        if owner not in known:
            raise unknown_name("owner of documents", owner, known)
    gone = {
        *(ids or ()),
        *(key for key, whose in zip(index.ids, index.owners, strict=True) if whose in (owners or ())),
    }
    with writing_to(out):
        index.remove(gone)
        index.save()
    if as_json:
        print_json({"removed": len(gone), "documents": len(index.ids)})
    else:
        print_line(f"Removed {len(gone)} documents; {len(index.ids)} are left.")


@group.command("show", epilog=examples("coterie index show manuals --json"))
def show(
    out: IndexArgument,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read all vectors, and see that they are what was written.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what an index holds.

    Documents by owner, size, and the base that encoded them.
    """
    from pipelines.retrieval.index import open_index

    index = open_index(out, verify=verify)
    counts: dict[str | None, int] = {}
    for owner in index.owners:
        counts[owner] = counts.get(owner, 0) + 1
    size = sum(path.stat().st_size for path in out.iterdir() if path.is_file())
    data = {
        "documents": len(index.ids),
        "dimension": index.info.dimension,
        "backend": index.info.backend,
        "base": index.info.base,
        "bytes": size,
        "verified": verify,
    }
    named = sorted((owner, count) for owner, count in counts.items() if owner)
    if as_json:
        print_json({**data, "owners": dict(named), "unowned": counts.get(None, 0)})
        return
    print_fields({**data, "bytes": human_bytes(size), "verified": "yes" if verify else "no (--verify)"})
    rows = [*named, *([("-", counts[None])] if None in counts else [])]
    print_table(rows, columns=("OWNER", "DOCUMENTS"), empty="No documents.", right=("DOCUMENTS",))


SEARCH_EXAMPLES = examples(
    "coterie search manuals composed 'how is a wing tested?'",
    "coterie search manuals composed 'how is a wing tested?' --opt-out acme --top-k 3 --json",
)


def search(
    context: typer.Context,
    index: IndexArgument,
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A composed retriever, or a stock one.", show_default=False),
    ],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What to look for.", show_default=False)],
    opt_out: Annotated[
        list[str] | None,
        typer.Option(
            "--opt-out",
            metavar="OWNER",
            help="Leave this owner's experts and documents out; may be given several times.",
            show_default=False,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="How many documents.")] = 10,
    device: DeviceOption = "auto",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find documents in an index, and whose expert answers.

    Leaving an owner out gives exactly what an index and a model without the owner give. Owners who have opted out in
    the registry are left out too.
    """
    from pipelines.retrieval.encoders import check_queries
    from pipelines.retrieval.index import open_index, owner_mask

    check_queries([query])
    found = open_index(index)
    store = open_registry(context, registry)
    with _encoder(model, device=device, registry=store) as encoder:
        found = open_index(index, base=encoder.base)
        left_out = _left_out(opt_out or (), encoder, found, store)
        _note_length(query, encoder)
        experts = left_out.intersection(encoder.known)
        vectors, (route,) = encoder.routed([query], opt_out=experts)
    (hits,) = found.search(vectors, k=top_k, allow=owner_mask(found.owners, left_out))
    if as_json:
        _print_found(route, hits, left_out)
        return
    share = ", ".join(
        f"{owner} {weight:.0%}" for owner, weight in sorted(route.weights.items(), key=lambda w: -w[1])
    )
    print_line(f"answered by {route.expert or 'the base'} ({share})")
    print_table(
        [(rank, f"{hit.score:.4f}", hit.id, hit.owner) for rank, hit in enumerate(hits, start=1)],
        columns=("RANK", "SCORE", "DOCUMENT", "OWNER"),
        empty="No document may be found.",
        right=("RANK", "SCORE"),
    )


def _print_found(route: Route, hits: Sequence[Hit], left_out: Collection[str]) -> None:
    print_json(
        {
            "expert": route.expert,
            "owner": route.owner,
            "weights": dict(route.weights),
            "opt_out": sorted(left_out),
            "documents": [{"id": hit.id, "score": hit.score, "owner": hit.owner} for hit in hits],
        }
    )


def _left_out(opt_out: Collection[str], encoder: Encoder, index: Index, registry: Registry) -> set[str]:
    """Check names against owners of experts, their parents and documents; add who has opted out in the registry."""
    from experts.names import unknown_name

    revoked = {entry.owner for entry in registry.opt_outs()}
    documents = {owner for owner in index.owners if owner}
    known = documents.union(encoder.known)
    for owner in opt_out:
        if owner not in known | revoked:
            raise unknown_name("owner", owner, known)
    for owner in sorted((revoked & documents) - set(opt_out)):
        note(f"Note: {owner} has opted out, so the owner's documents are left out.")
    return {*opt_out, *revoked}


def _note_length(query: str, encoder: Encoder) -> None:
    tokens = encoder.tokens(query)
    if tokens > encoder.longest:
        note(f"Note: the query has {tokens:,} tokens; the model reads the first {encoder.longest:,}.")


def _documents(corpus: Sequence[Path], owner: str | None) -> list[Document]:
    """Read all files; an id may occur once in all of them."""
    from dataclasses import replace

    from experts.names import check_owner_name
    from pipelines.retrieval.collection import read_corpus

    documents: dict[str, Document] = {}
    for path in corpus:
        for document in read_corpus(path):
            if document.id in documents:
                raise OptionError(f"The id '{document.id}' occurs in two files. Ids are unique in an index.")
            documents[document.id] = document
    if owner is None:
        return list(documents.values())
    check_owner_name(owner)
    return [replace(document, owner=document.owner or owner) for document in documents.values()]


@contextmanager
def _encoder(model: Path, *, device: str, registry: Registry | None = None) -> Iterator[Encoder]:
    from pipelines.retrieval.encoders import open_encoder

    with quiet_transformers():
        yield open_encoder(model, registry=registry, device=_device(device))


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _fill(
    index: Index,
    encoder: Encoder,
    documents: Sequence[Document],
    *,
    out: Path,
    batch_size: int,
    as_json: bool,
) -> None:
    began = perf_counter()
    with count_bar("Indexing", unit="documents") as progress:

        def vectors() -> Iterator[Vectors]:
            for start in range(0, len(documents), _PART):
                part = [document.text for document in documents[start : start + _PART]]
                yield encoder.documents(part, batch_size=batch_size)
                progress(start + len(part), len(documents))

        index.add(
            [document.id for document in documents], vectors(), [document.owner for document in documents]
        )
    index.save()
    seconds = perf_counter() - began
    speed = len(documents) / seconds
    if as_json:
        data = {"added": len(documents), "documents": len(index.ids)}
        print_json({**data, "seconds": seconds, "documents_per_second": speed})
        return
    print_line(f"Indexed {len(documents)} documents in {seconds:.1f} s ({speed:,.0f} documents/s).")
    print_line(f"{out} holds {len(index.ids)} documents.")
