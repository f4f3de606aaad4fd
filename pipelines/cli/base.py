"""``coterie base``: the public anchors of a registry on the command line.

Knows where a checkpoint may come from (a folder, or the Hugging Face hub) and how to show what was stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from experts.errors import AssetError, CoterieError
from pipelines.cli.errors import writing_to
from pipelines.cli.options import JsonOption, RegistryOption, complete_base, examples, open_registry
from pipelines.cli.output import human_bytes, human_count, print_fields, print_json, print_line, print_table
from pipelines.cli.progress import byte_bar, spinner

if TYPE_CHECKING:
    from registry import BaseRecord, Registry

__all__ = ["group"]

group = typer.Typer(
    help="Add and show public base models.",
    no_args_is_help=True,
    rich_markup_mode=None,
    epilog=examples(
        "coterie base add ./smollm2 --name smollm2",
        "coterie base public-routing smollm2 --text public.jsonl",
        "coterie base list",
    ),
)

NameArgument = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The base's name.", autocompletion=complete_base, show_default=False),
]


@group.command(
    "add",
    epilog=examples(
        "coterie base add ./smollm2 --name smollm2",
        "coterie base add HuggingFaceTB/SmolLM2-135M --name smollm2",
    ),
)
def add(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="PATH_OR_HF_ID",
            help="A checkpoint folder (config.json, safetensors, tokenizer; for an embedding model the files of "
            "sentence-transformers too), or a model id of the Hugging Face hub.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Option("--name", help="What manifests will call it.", show_default=False)],
    revision: Annotated[
        str | None,
        typer.Option(
            "--revision", help="The hub's branch, tag or commit; only for a model id.", show_default=False
        ),
    ] = None,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Copy a public base model into the registry.

    Its fingerprint is computed once. Experts and compositions refer to it by name and fingerprint; builds link
    its files and copy nothing.
    """
    store = open_registry(context, registry)
    folder = _checkpoint(source, revision)
    with byte_bar(f"Adding {name}") as report:
        record = store.add_base(folder, name=name, progress=report)
    if as_json:
        print_json(base_row(record))
        return
    size = sum(file.size for file in record.files)
    print_line(
        f"Added base {record.name}: {len(record.files)} files, {human_bytes(size)}, "
        f"fingerprint {record.fingerprint[:12]}."
    )


def _checkpoint(source: str, revision: str | None) -> Path:
    """Return the folder that ``source`` names, having fetched it from the hub where it is a model id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise CoterieError(f"--revision is for the hub, but '{source}' is a folder. Leave it out.")
        return folder
    if folder.exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise CoterieError(
            f"There is no folder '{source}'. Give a checkpoint folder, or a model id of the Hugging Face hub such as "
            "HuggingFaceTB/SmolLM2-135M."
        )
    return _from_hub(source, revision)


def _from_hub(source: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Only what a base consists of: no pickles, no code.
    allowed = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "tokenizer.model",
        "merges.txt",
        "vocab.txt",
        "README.md",
        "LICENSE*",
    ]
    try:
        with spinner(f"Fetching {source}"):
            return Path(snapshot_download(source, revision=revision, allow_patterns=allowed))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise AssetError(
            f"'{source}' is no folder here and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}). Check the name and the connection, or give a folder."
        ) from error


def base_row(record: BaseRecord) -> dict[str, Any]:
    """Return what ``--json`` says of a base wherever one is listed."""
    return {
        "name": record.name,
        "fingerprint": record.fingerprint,
        "tokenizer_fingerprint": record.tokenizer_fingerprint,
        "bytes": sum(file.size for file in record.files),
        "created": record.created,
        "routing": record.routing.model_dump(mode="json") if record.routing else None,
        "files": [file.model_dump(mode="json") for file in record.files],
    }


@group.command("list", epilog=examples("coterie base list", "coterie base list --json"))
def list_bases(context: typer.Context, registry: RegistryOption = None, as_json: JsonOption = False) -> None:
    """List the bases of the registry."""
    store = open_registry(context, registry)
    records = store.bases()
    if as_json:
        print_json([base_row(record) for record in records])
        return
    print_table(
        [
            (
                record.name,
                human_bytes(sum(file.size for file in record.files)),
                record.fingerprint[:12],
                "yes" if record.routing else "no",
                record.created,
            )
            for record in records
        ],
        columns=("BASE", "SIZE", "FINGERPRINT", "PUBLIC ROUTING", "ADDED"),
        empty=f"There is no base in the registry '{store.path}' yet. Add one with 'coterie base add PATH --name NAME'.",
        right=("SIZE",),
    )


@group.command("show", epilog=examples("coterie base show smollm2", "coterie base show smollm2 --json"))
def show(
    context: typer.Context, name: NameArgument, registry: RegistryOption = None, as_json: JsonOption = False
) -> None:
    """Show one base: shape, fingerprints, public routing, files."""
    record = open_registry(context, registry).base(name)
    if as_json:
        print_json({**base_row(record), "shape": _shape(record)})
        return
    print_fields(
        {
            "base": record.name,
            "added": record.created,
            **{key.replace("_", " "): value for key, value in _shape(record).items()},
            "fingerprint": record.fingerprint,
            "tokenizer fingerprint": record.tokenizer_fingerprint,
            "public routing": record.routing.model_dump() if record.routing else None,
            "files": {file.path: f"{human_bytes(file.size)}, sha256 {file.sha256}" for file in record.files},
        }
    )


def _shape(record: BaseRecord) -> dict[str, Any]:
    described = record.description
    return {
        "model_type": described.config.get("model_type"),
        "layers": described.num_layers,
        "hidden_size": described.hidden_size,
        "intermediate_size": described.intermediate_size,
        "dtype": described.dtype,
        **({"embedding": described.embedding.model_dump()} if described.embedding else {}),
    }


@group.command(
    "public-routing",
    epilog=examples(
        "coterie base public-routing smollm2 --text public.jsonl",
        "coterie base public-routing smollm2 --text public.jsonl --layers 15-29 --rows",
        "coterie base public-routing smollm2 --from ./public-routing",
    ),
)
def public_routing(
    context: typer.Context,
    name: NameArgument,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Public text: .jsonl with a text field a line, or .txt; may be given several times.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FOLDER",
            help="Artefacts made elsewhere: routing.safetensors and routing.json.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="The layers that owners train, as in their job files.")
    ] = "upper-half",
    rows: Annotated[
        bool, typer.Option("--rows", help="Also make a public router row for each of these layers.")
    ] = False,
    inputs: Annotated[
        bool,
        typer.Option(
            "--inputs",
            help="Also sum up what the routers of whole models read, for the scorer dume; see 'coterie expert "
            "statistics'.",
        ),
    ] = False,
    embedder: Annotated[
        Path | None,
        typer.Option(
            "--embedder",
            metavar="FOLDER",
            help="A SentenceTransformer: also publish the text's embedding, and start --rows at it.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Decides which windows of the text are used.")
    ] = 0,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Attach routing artefacts of public text to a base.

    Routers learn from them what belongs to nobody. Statistics are taken of the states entering the first of the
    layers, where owners take theirs; beside an embedding model, each text is a query. The newest artefacts count;
    folders built earlier keep their own.
    """
    store = open_registry(context, registry)
    if (source is None) == (not text):
        raise CoterieError(
            "Give either --text (public text to compute from) or --from (artefacts made elsewhere)."
        )
    if embedder is not None and not (embedder / "modules.json").is_file():
        raise CoterieError(
            f"--embedder '{embedder}' is not the folder of a SentenceTransformer (no modules.json in it)."
        )
    if source is not None:
        record = _attach(store, name, source)
    else:
        record = _compute(
            store, name, text or [], layers=layers, rows=rows, inputs=inputs, embedder=embedder, seed=seed
        )
    if as_json:
        print_json(base_row(record))
        return
    print_line(f"Attached public routing artefacts to base {record.name}: {_describe(record)}.")


def _describe(record: BaseRecord) -> str:
    parts = []
    if record.routing and record.routing.statistics:
        statistics = record.routing.statistics
        parts.append(f"statistics of {human_count(statistics.tokens)} tokens at layer {statistics.layer}")
    if record.routing and record.routing.inputs:
        parts.append(f"sums of the router inputs of {len(record.routing.inputs.layers)} layers")
    if record.routing and record.routing.rows:
        parts.append(f"rows for {len(record.routing.rows.layers)} layers")
    if record.routing and record.routing.retrieval:
        retrieval = record.routing.retrieval
        parts.append(f"sums over the embeddings of {human_count(retrieval.queries)} queries")
    if record.routing and record.routing.embedding:
        parts.append(f"the text's embedding by {record.routing.embedding.model}")
    return " and ".join(parts) or "nothing"


def _attach(store: Registry, name: str, folder: Path) -> BaseRecord:
    from experts.routing_artifacts import RoutingInfo
    from experts.strict import load_json, validate

    path = folder / "routing.json"
    if not path.is_file():
        raise CoterieError(f"'{folder}' holds no routing.json, which says what its artefacts are.")
    info = validate(RoutingInfo, load_json(path, what=str(path), max_bytes=1 << 20), what=str(path))
    return store.set_base_routing(name, folder, info)


def _compute(
    store: Registry,
    name: str,
    text: list[Path],
    *,
    layers: str,
    rows: bool,
    inputs: bool,
    embedder: Path | None,
    seed: int,
) -> BaseRecord:
    import tempfile

    from pipelines.train import public_routing as compute
    from pipelines.train.anchor import resolve_base
    from pipelines.train.layer_choice import parse_layers
    from pipelines.train.retrieval_routing import query_routing
    from pipelines.train.windows import read_documents

    documents = read_documents(text)
    described = store.base(name).description
    numbers = parse_layers(layers, num_layers=described.num_layers)
    if described.embedding is not None and (rows or inputs or embedder is not None):
        raise CoterieError(
            f"'{name}' is an embedding model: --rows, --inputs and --embedder are for language models. Leave them out."
        )
    with tempfile.TemporaryDirectory(prefix="coterie-routing-") as scratch, writing_to(Path(scratch)):
        out = Path(scratch) / "routing"
        with resolve_base(name, registry=store) as base, spinner("Computing public routing artefacts"):
            if described.embedding is not None:
                query_routing(base, documents, out=out, layer=numbers[0], second_moment=True)
                return _attach(store, name, out)
            compute(
                base,
                documents,
                out=out,
                layer=numbers[0],
                rows_layers=numbers if rows else (),
                inputs=inputs,
                embedder=embedder,
                seed=seed,
            )
        return _attach(store, name, out)
