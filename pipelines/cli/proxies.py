"""``coterie expert proxies``: public documents that look like an owner's, for tuning routers without the owner's text.

Knows options and files; the choice is made in ``pipelines.train.proxies``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from experts.errors import CoterieError
from pipelines.cli.errors import writing_to
from pipelines.cli.output import print_line

__all__ = ["proxies"]


def proxies(
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            metavar="FILE",
            help="The owner's text: .jsonl with a text field a line, or .txt; may be given several times.",
            show_default=False,
        ),
    ],
    public: Annotated[
        list[Path],
        typer.Option(
            "--public",
            metavar="FILE",
            help="Public text to choose from, in the same formats; may be given several times.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="The .jsonl file to write.", show_default=False),
    ],
    count: Annotated[int, typer.Option("--count", min=1, help="At most this many documents.")] = 1000,
) -> None:
    """Choose public documents that look like an owner's.

    A classifier tells the owner's text from public text; the public documents that it takes for the owner's are
    written, the most alike first. Nothing of another owner is needed. The choice says which public documents the
    owner's text resembles: look at it before you pass it on.
    """
    from experts.files import write_atomic
    from pipelines.train.proxies import choose_proxies
    from pipelines.train.windows import read_documents

    if out.exists():
        raise CoterieError(f"'{out}' exists already. Choose another file, or remove it.")
    candidates = read_documents(public)
    chosen = choose_proxies(read_documents(data), candidates, count=count)
    lines = "".join(json.dumps({"text": candidates[position]}) + "\n" for position in chosen)
    with writing_to(out.parent):
        write_atomic(out, lines.encode())
    print_line(f"Wrote {len(chosen)} of {len(candidates)} public documents to {out}.")
