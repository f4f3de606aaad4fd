"""Checks that the small files which decide how texts become vectors are still the base's, at the top and in ``base/``.

The base's documents are in indexes that were made before; another pooling, prompt or longest input would give vectors
that do not match them, without a word. Knows files and digests; opens no tensor.
"""

from __future__ import annotations

import json
from pathlib import Path

from composer.building import TOKENIZER_FILES
from composer.lock import Lock
from composer.members import BASE_FOLDER, DESCRIPTION_NAME
from composer.retrieval.form import MODULES_NAME, QUERY_KWARGS, SETTINGS_FILES, TOP_FILES
from experts.base import BaseDescription
from experts.embedding import embedding_differences, read_embedding
from experts.errors import BuildError, IntegrityError
from experts.files import sha256_file

__all__ = ["check_modules", "check_settings"]

_AT_THE_TOP = (*TOP_FILES, *TOKENIZER_FILES)


def check_settings(folder: Path, lock: Lock, description: BaseDescription) -> None:
    """Refuse a composed retriever whose settings are no longer those that it was built with.

    Args:
        folder: The composed folder.
        lock: Of it; has the digest of every file of the base.
        description: What ``base.json`` says of the base.

    Raises:
        BuildError: A file is missing, was added, or is not what the base's say.
        IntegrityError: A file's bytes differ from its digest.
    """
    digests = {entry.path: entry.sha256 for entry in lock.base.files}
    for name in SETTINGS_FILES:
        places = [folder / BASE_FOLDER / name, *([folder / name] if name in _AT_THE_TOP else [])]
        for path in places:
            _check_file(path, digests.get(name), like=places[0])
    check_modules(folder)
    modules = json.loads((folder / BASE_FOLDER / MODULES_NAME).read_text(encoding="utf-8"))
    modules[0]["kwargs"] = list(QUERY_KWARGS)
    if json.loads((folder / MODULES_NAME).read_text(encoding="utf-8")) != modules:
        raise BuildError(
            f"{folder / MODULES_NAME} lists other modules than {BASE_FOLDER}/{MODULES_NAME}. Build the folder again."
        )
    _check_description(folder, description)


def _check_file(path: Path, digest: str | None, *, like: Path) -> None:
    """Compare a file with its digest; one that is linked to ``like``, which was compared, is not read again."""
    if digest is None:
        if path.exists():
            raise BuildError(
                f"{path} was added after the build: the base has no such file, and it may decide how texts become "
                "vectors. Remove it, or build the folder again."
            )
        return
    if not path.is_file():
        raise BuildError(f"{path} is missing. Build the folder again.")
    if path is not like and path.samefile(like):
        return
    if (found := sha256_file(path, follow_symlinks=True)) != digest:  # a hub's cache is made of links
        raise IntegrityError(
            f"{path} has sha256 {found}, the composition says {digest}. It decides how texts become vectors, so they "
            "would not fit those of an index. Build the folder again."
        )


def _check_description(folder: Path, description: BaseDescription) -> None:
    if description.embedding is None:
        raise BuildError("The base is not an embedding model. Build the folder again.")
    found = read_embedding(
        folder / BASE_FOLDER, config=description.config, hidden_size=description.hidden_size
    )
    names = (f"{BASE_FOLDER}/", DESCRIPTION_NAME)
    if differences := embedding_differences(found, description.embedding, of=names):
        raise BuildError(
            f"{folder / DESCRIPTION_NAME} describes another base than the one beside it: {'; '.join(differences)}. "
            "Build the folder again."
        )


def check_modules(folder: Path) -> None:
    """Refuse a folder whose modules.json would keep the task from the encoder: queries would silently be documents.

    Raises:
        BuildError: It does.
    """
    path = folder / MODULES_NAME
    try:
        first = json.loads(path.read_text(encoding="utf-8"))[0]
        passed = set(first.get("kwargs", ()))
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        raise BuildError(f"{path} is missing or is no list of modules. Build the folder again.") from None
    if not set(QUERY_KWARGS) <= passed:
        raise BuildError(
            f"{path} passes {sorted(passed)} to its first module; {', '.join(QUERY_KWARGS)} are needed, or queries "
            "would be encoded as documents. Build the folder again."
        )
