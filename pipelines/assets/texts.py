"""Real text of clearly different domains, as documents, split into training and held-out ones.

Knows how to read each source and which documents are too alike to be put on different sides; knows nothing of
tokens or models.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from experts.names import unknown_name
from pipelines.assets.fetch import asset_files

__all__ = ["TEXTS", "DomainText", "book_text", "domain_text", "draw", "families"]

_HELD_OUT = 0.2
"""Share of the documents (for licences: of the families) that is held out."""

_SHINGLE_WORDS = 8
_SHARED = 0.25
"""Two texts are of one family if they share this part of the shorter one's runs of `_SHINGLE_WORDS` words."""

Document = tuple[str, str]
"""A key that stays when the text is corrected, and the text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainText:
    """Documents of one domain, in an order that depends on their keys alone.

    Attributes:
        name: The domain.
        training: Documents to train on.
        held_out: Documents to measure on.
        license: SPDX expression of the text.
        source: Where it is from, in a sentence.
    """

    name: str
    training: tuple[str, ...]
    held_out: tuple[str, ...]
    license: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """How a domain's documents are read.

    Attributes:
        read: Gives the documents.
        asset: The asset it reads; None: nothing is downloaded.
        license: SPDX expression of the text.
        source: Where it is from, in a sentence.
        by_family: Whether documents that share passages must stay on one side.
    """

    read: Callable[[Sequence[Path]], Iterator[Document]]
    asset: str | None
    license: str
    source: str
    by_family: bool = False


def domain_text(
    name: str, *, cache: Path | None = None, progress: Callable[[str], None] | None = None
) -> DomainText:
    """Read a domain's text, downloading its asset if need be.

    The side of a document depends on its key (for licences: on its family's) alone, so it stays the same when
    others come and go.

    Args:
        name: A name of `TEXTS`.
        cache: Another cache folder than `pipelines.assets.cache_folder`.
        progress: Told what is being fetched.

    Raises:
        UnknownNameError: There is no such domain.
        AssetError: Its asset cannot be had.
    """
    if name not in TEXTS:
        raise unknown_name("domain text", name, TEXTS)
    source = TEXTS[name]
    files = asset_files(source.asset, cache=cache, progress=progress) if source.asset else ()
    documents = sorted(source.read(files))
    groups = families([text for _, text in documents]) if source.by_family else range(len(documents))
    drawn = [
        (draw(key), draw(documents[group][0]) < _HELD_OUT, text)
        for (key, text), group in zip(documents, groups, strict=True)
    ]
    drawn.sort()
    return DomainText(
        name=name,
        training=tuple(text for _, out, text in drawn if not out),
        held_out=tuple(text for _, out, text in drawn if out),
        license=source.license,
        source=source.source,
    )


def draw(key: str) -> float:
    """Return a number in [0, 1) made of ``key``, the same everywhere."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def families(texts: Sequence[str]) -> list[int]:
    """Group texts that share passages: for each text the number of its family's first member.

    Sharing carries over (the connected components of "shares a quarter of its eight-word runs"), so that no
    text has a near duplicate in another family.
    """
    shingles = [_shingles(text) for text in texts]
    parent = list(range(len(texts)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for right in range(len(texts)):
        for left in range(right):
            if root(left) == root(right):
                continue
            shared = len(shingles[left] & shingles[right])
            if shared > _SHARED * min(len(shingles[left]), len(shingles[right])):
                older, younger = sorted((root(left), root(right)))
                parent[younger] = older
    return [root(index) for index in range(len(texts))]


def _shingles(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)}


# ---------------------------------------------------------------- Python: this interpreter's standard library

_NOT_LIBRARY = re.compile(
    r"(^|/)(tests?|idle_test|site-packages|dist-packages|lib2to3|pydoc_data|encodings|config-[^/]*)(/|$)|/test_"
)
_SHORTEST_MODULE = 1500


def _read_python(files: Sequence[Path]) -> Iterator[Document]:
    """The modules of the standard library, tests and tables of data left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _NOT_LIBRARY.search(name):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if len(text) >= _SHORTEST_MODULE:
            yield name, text


# ---------------------------------------------------------------- ICD-10-CM: one document per section of the list

_SHORTEST_SECTION = 800
_NOTES = {
    "inclusionTerm": "Includes",
    "includes": "Includes",
    "excludes1": "Excludes1",
    "excludes2": "Excludes2",
    "useAdditionalCode": "Use additional code",
    "codeFirst": "Code first",
    "codeAlso": "Code also",
    "notes": "Note",
    "sevenChrNote": "Seventh character",
}


def _read_icd(files: Sequence[Path]) -> Iterator[Document]:
    """Sections such as A00-A09, each code on a line with its notes indented below."""
    for path in files:
        for section in ElementTree.parse(path).getroot().iter("section"):
            lines = [section.findtext("desc") or "", *_icd_notes(section)]
            for diagnosis in section.findall("diag"):
                lines += _icd_lines(diagnosis)
            text = "\n".join(lines) + "\n"
            if len(text) >= _SHORTEST_SECTION:
                yield section.get("id") or lines[0], text


def _icd_lines(diagnosis: ElementTree.Element) -> Iterator[str]:
    yield f"{diagnosis.findtext('name')} {diagnosis.findtext('desc')}"
    yield from _icd_notes(diagnosis)
    for child in diagnosis.findall("diag"):
        yield from _icd_lines(child)


def _icd_notes(element: ElementTree.Element) -> Iterator[str]:
    for child in element:
        if child.tag in _NOTES:
            for note in child.findall("note"):
                yield f"  {_NOTES[child.tag]}: {note.text}"


# ---------------------------------------------------------------- licences: the texts of the SPDX list

_NOT_ENGLISH = re.compile(r"CECILL-(1\.0|2\.0|B|C)$|LiLiQ|D-FSL|NLOD")
_SHORTEST_LICENSE = 600


def _read_licenses(files: Sequence[Path]) -> Iterator[Document]:
    """Every licence in English that is longer than a paragraph."""
    for path in files:
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.stem != "README" and not _NOT_ENGLISH.match(path.stem) and len(text) >= _SHORTEST_LICENSE:
            yield path.stem, text


# ---------------------------------------------------------------- prose: books of Project Gutenberg, without its notes

_BOOKS = {
    # where a book begins and what follows it: contents, front matter and the project's own notes are left out
    "stories": (
        "\nADVENTURE  I.  A SCANDAL IN BOHEMIA\n",
        "*** END OF THE PROJECT GUTENBERG EBOOK, THE ADVENTURES",
    ),
    "history": ("\nTHE GREAT MIGRATION TO AMERICA\n", "End of the Project Gutenberg EBook of History"),
    "surgery": ("\nCHAPTER I\n\nREPAIR\n", "End of the Project Gutenberg EBook of Manual of Surgery"),
    "novel": ("\nBOOK ONE: 1805\n", "*** END OF THE PROJECT GUTENBERG EBOOK, WAR AND PEACE"),
}
_PASSAGE = 2500


def _read_books(*names: str) -> Callable[[Sequence[Path]], Iterator[Document]]:
    def read(files: Sequence[Path]) -> Iterator[Document]:
        for path in files:
            whole = path.read_text(encoding="utf-8", errors="replace")
            for name in names:
                yield from _passages(name, _cut_book(whole, name))

    return read


def book_text(path: Path, name: str) -> str:
    """Return the text of one of the books in the file that holds them all."""
    return _cut_book(path.read_text(encoding="utf-8", errors="replace"), name)


def _cut_book(whole: str, name: str) -> str:
    first, last = _BOOKS[name]
    start = whole.index(first)
    return whole[start : whole.index(last, start)]


def _passages(name: str, text: str) -> Iterator[Document]:
    """Consecutive paragraphs, lines joined, until a passage has `_PASSAGE` characters."""
    passage, number = "", 0
    for paragraph in text.split("\n\n"):
        joined = " ".join(paragraph.split())
        passage += f"{joined}\n" if joined else ""
        if len(passage) >= _PASSAGE:
            yield f"{name}/{number}", passage
            passage, number = "", number + 1


TEXTS: dict[str, TextSource] = {
    "python": TextSource(
        read=_read_python,
        asset=None,
        license="PSF-2.0",
        source="The standard library of the running Python, tests left out, one document per module.",
    ),
    "icd10": TextSource(
        read=_read_icd,
        asset="icd10cm",
        license="LicenseRef-US-Government-Work",
        source="ICD-10-CM, tabular list of diseases, one document per section.",
    ),
    "licences": TextSource(
        read=_read_licenses,
        asset="spdx-licenses",
        license="CC0-1.0",
        source="Software licences of the SPDX list in English; those that share passages stay together.",
        by_family=True,
    ),
    "prose": TextSource(
        read=_read_books("stories", "history", "novel"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="Detective stories, a history of the United States and a novel, in passages.",
    ),
    "stories": TextSource(
        read=_read_books("stories"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="Detective stories, in passages; a part of the prose.",
    ),
    "history": TextSource(
        read=_read_books("history"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="A history of the United States, in passages; a part of the prose.",
    ),
    "novel": TextSource(
        read=_read_books("novel"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="A novel, in passages; a part of the prose.",
    ),
    "surgery": TextSource(
        read=_read_books("surgery"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="A manual of surgery, in passages; near the hospital's domain and in nobody's.",
    ),
}
"""Every domain's text by name."""
