"""Loads a composed folder for a command: owners left out, revocations said aloud, transformers kept quiet.

Knows folders and devices; knows nothing of what the model is used for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from experts.errors import CoterieError
from pipelines.cli.output import note

if TYPE_CHECKING:
    from composer.model import ComposedForCausalLM
    from registry import Registry

__all__ = ["DeviceOption", "OptionError", "open_folder", "quiet_transformers"]

DeviceOption: TypeAlias = Annotated[
    str, typer.Option("--device", help="Where the model runs: auto, cpu, cuda, cuda:1, ...")
]


class OptionError(CoterieError):
    """Options that contradict each other or have no effect."""


@contextmanager
def open_folder(
    out: Path, *, opt_out: Collection[str], registry: Registry, device: str
) -> Iterator[tuple[ComposedForCausalLM, Any]]:
    """Yield a composed model and its tokenizer; say on stderr whom the registry leaves out.

    Names are checked before anything heavy is imported, so that a typing mistake is reported at once.
    """
    from composer.lock import Lock
    from composer.optout import check_owners

    lock = Lock.read(out)
    check_owners(set(opt_out), lock.owners)
    revoked = {entry.owner for entry in registry.opt_outs()} & set(lock.owners)
    for owner in sorted(revoked - set(opt_out)):
        note(f"Note: {owner} has opted out since the build and is left out.")

    from transformers import AutoTokenizer

    import composer

    with quiet_transformers():
        model = composer.load(out, opt_out=set(opt_out), registry=registry, device=device)
        yield model, AutoTokenizer.from_pretrained(out, local_files_only=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and advice off the terminal inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
