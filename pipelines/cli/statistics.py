"""``coterie expert statistics``: what the owner of a whole model publishes so that routers can be solved for it.

Knows options and how to say what was written; the sums are made in ``pipelines.train.router_inputs``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.cli.errors import writing_to
from pipelines.cli.loading import OptionError, quiet_transformers
from pipelines.cli.options import (
    PACKAGE_FOLDER,
    JsonOption,
    RegistryOption,
    complete_expert,
    open_registry,
)
from pipelines.cli.output import human_count, print_fields, print_json
from pipelines.cli.progress import spinner

__all__ = ["statistics"]


def statistics(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="EXPERT",
            help="A whole model: owner/expert, owner/expert@VERSION, or a folder with a card, as 'coterie train' "
            "writes it.",
            autocompletion=complete_expert,
            show_default=False,
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            "--text",
            metavar="FILE",
            help="The owner's text: .jsonl with a text field a line, or .txt; may be given several times. It is not "
            "published.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, PACKAGE_FOLDER],
    attention: Annotated[
        Literal["own", "shared"] | None,
        typer.Option(
            "--attention",
            help="Sums for attention routers too, as recipe bam has them, with keys and values of its own or shared.",
            show_default=False,
        ),
    ] = None,
    embedder: Annotated[
        Path | None,
        typer.Option(
            "--embedder",
            metavar="FOLDER",
            help="A SentenceTransformer: publish the text's mean embedding too; all owners take the same one.",
            show_default=False,
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option("--sequence-length", min=2, help="Tokens in a window of the text.")
    ] = 128,
    windows: Annotated[int, typer.Option("--windows", min=1, help="At most this many windows.")] = 256,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Decides which windows are used.")] = 0,
    registry: RegistryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sum up what routers read on the owner's text, for a whole model (kind dense).

    For each layer n, the sum of x and the sum of x xT are published, x being what the layer's router reads when all
    tokens go to this model on the base's trunk. The scorer 'dume' and 'coterie add --new-rows statistics' need them of
    every expert; 'dume' needs the base's too: 'coterie base public-routing --inputs'. With --embedder also what
    'coterie add --new-rows embedding' needs. Sums are averages of the text: they say in which directions its states
    lie, so look at how much text stands behind them.
    """
    if embedder is not None and not (embedder / "modules.json").is_file():
        raise OptionError(
            f"--embedder '{embedder}' is not the folder of a SentenceTransformer (no modules.json in it)."
        )
    store = open_registry(context, registry)
    from pipelines.train.windows import read_documents

    documents = read_documents(text)

    from pipelines.train.router_inputs import publish_statistics

    with quiet_transformers(), spinner("Summing up"), writing_to(out):
        card = publish_statistics(
            source,
            documents,
            registry=store,
            out=out,
            attention=attention,
            embedder=embedder,
            sequence_length=sequence_length,
            windows=windows,
            seed=seed,
        )
    inputs = card.routing.inputs if card.routing else None
    assert card.routing is not None, "it was written"
    assert inputs is not None, "it was written"
    if as_json:
        print_json(
            {
                "name": card.name,
                "version": card.version,
                "digest": card.digest,
                "out": str(out),
                "routing": card.routing.model_dump(mode="json"),
            }
        )
        return
    print_fields(
        {
            "sums": f"inputs of the {' and '.join(inputs.branches)} routers of {len(inputs.layers)} layers",
            "over": f"{human_count(inputs.tokens)} tokens of {inputs.documents} documents",
            "embedding": card.routing.embedding.model if card.routing.embedding else None,
            "written": f"{out}: {card.name}@{card.version}, to be registered",
        }
    )
