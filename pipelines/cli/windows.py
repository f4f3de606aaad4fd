"""Options of commands that measure on text: domains and their files, and how the text is cut into windows.

Knows how they are written; knows nothing of what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from pipelines.cli.loading import OptionError

__all__ = ["BatchSizeOption", "DataOption", "MaxTokensOption", "SequenceLengthOption", "domain_files"]

DataOption: TypeAlias = Annotated[
    list[str],
    typer.Option(
        "--data",
        metavar="DOMAIN=FILE",
        help="Held-out text of a domain: .jsonl with a text field a line, or .txt; may be given several times.",
        show_default=False,
    ),
]
SequenceLengthOption: TypeAlias = Annotated[
    int, typer.Option("--sequence-length", min=2, help="Tokens in a window.")
]
MaxTokensOption: TypeAlias = Annotated[
    int, typer.Option("--max-tokens", min=0, help="At most about this many tokens of a domain; 0: all.")
]
BatchSizeOption: TypeAlias = Annotated[int, typer.Option("--batch-size", min=1, help="Windows run at once.")]


def domain_files(data: Sequence[str]) -> dict[str, Path]:
    """Split ``DOMAIN=FILE``.

    Raises:
        OptionError: Another form, or a domain that is named twice.
    """
    files: dict[str, Path] = {}
    for given in data:
        domain, _, file = given.partition("=")
        if not (domain and file):
            raise OptionError(f"--data '{given}' is not of the form DOMAIN=FILE, for instance law=law.jsonl.")
        if domain in files:
            raise OptionError(f"--data names the domain '{domain}' twice. Put its text into one file.")
        files[domain] = Path(file)
    return files
