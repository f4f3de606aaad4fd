"""Loads a composed folder for a command: owners left out, revocations said aloud, transformers kept quiet.

Knows folders and devices; knows nothing of what the model is used for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from experts.errors import CoterieError
from pipelines.cli.output import note

if TYPE_CHECKING:
    from composer.lock import Lock
    from composer.model import ComposedForCausalLM
    from registry import Registry

__all__ = [
    "DeviceOption",
    "DtypeOption",
    "OptionError",
    "dtype_name",
    "note_if_alone",
    "open_folder",
    "quiet_transformers",
]

DeviceOption: TypeAlias = Annotated[
    str, typer.Option("--device", help="Where the model runs: auto, cpu, cuda, cuda:1, ...")
]

DtypeOption: TypeAlias = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option(
        "--dtype",
        help="What to compute in. auto: the manifest's, or the faster one here that represents the weights exactly.",
    ),
]


class OptionError(CoterieError):
    """Options that contradict each other or have no effect."""


@contextmanager
def open_folder(
    out: Path, *, opt_out: Collection[str], registry: Registry, device: str, dtype: str = "auto"
) -> Iterator[tuple[ComposedForCausalLM, Any]]:
    """Yield a composed model and its tokenizer; say on stderr whom the registry leaves out, and what it computes in.

    Names are checked before anything heavy is imported, so that a typing mistake is reported at once.
    """
    from composer.lock import Lock
    from composer.optout import check_owners
    from composer.recipes import require_language_model

    lock = Lock.read(out)
    require_language_model(out, lock.recipe)
    check_owners(set(opt_out), lock.involved)
    revoked = {entry.owner for entry in registry.opt_outs()} & set(lock.involved)
    for owner in sorted(revoked - set(opt_out)):
        note(f"Note: {owner} has opted out since the build and is left out.")

    from transformers import AutoTokenizer

    import composer

    with quiet_transformers():
        chosen = _faster(out, lock, device) if dtype == "auto" else dtype
        model = composer.load(out, opt_out=set(opt_out), registry=registry, device=device, dtype=chosen)
        yield model, AutoTokenizer.from_pretrained(out, local_files_only=True)


def _faster(out: Path, lock: Lock, device: str) -> str | None:
    """Choose as a training job does, where the manifest did not choose; None: what the folder says."""
    import torch

    from composer.members import Members
    from pipelines.train.anchor import compute_dtype

    if (
        lock.dtype is not None
        or device not in ("auto", "cpu")
        or (device == "auto" and torch.cuda.is_available())
    ):
        return None
    description = Members(folder=out, lock=lock).description
    if description.dtype != "BF16" or compute_dtype(description) != "float32":
        return None
    note(
        "Note: computing in float32, which is faster on this machine than the model's own bfloat16 and represents its "
        "weights exactly; --dtype bfloat16 keeps to it."
    )
    return "float32"


def note_if_alone(model: ComposedForCausalLM) -> None:
    """Say on stderr that nobody's expert is left to answer, if so."""
    if model.membership.known_owners and not model.owners:
        note("Note: every owner is left out: the base model answers alone.")


def dtype_name(model: Any) -> str:
    """What a model computes in, for output: ``float32``."""
    return str(model.dtype).removeprefix("torch.")


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
