"""Real pairs of a query and the document that answers it, made from public text without anybody's judgement.

Knows how each source is cut into pairs and which side of the split a document is on; knows nothing of models.
Sources of Python code are read as text, never imported.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from experts.errors import AssetError
from experts.names import unknown_name
from pipelines.assets.fetch import asset_files
from pipelines.assets.texts import book_text, draw

__all__ = ["PAIRS", "DomainPairs", "Pair", "domain_pairs"]

_HELD_OUT = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A query and the one document that answers it.

    Attributes:
        id: Of the document; stays when the text is corrected.
        query: What is asked.
        document: What answers it.
    """

    id: str
    query: str
    document: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainPairs:
    """Pairs of one domain, split by document, in an order that depends on their ids alone.

    Attributes:
        name: The domain.
        training: Pairs to train on.
        held_out: Pairs to measure on; no document is on both sides.
        license: SPDX expression of the text.
        source: Where it is from, in a sentence.
    """

    name: str
    training: tuple[Pair, ...]
    held_out: tuple[Pair, ...]
    license: str
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSource:
    """How a domain's pairs are read.

    Attributes:
        read: Gives the pairs.
        asset: The asset it reads; None: nothing is downloaded.
        license: SPDX expression of the text.
        source: Where it is from, in a sentence.
    """

    read: Callable[[Sequence[Path]], Iterable[Pair]]
    asset: str | None
    license: str
    source: str


def domain_pairs(
    name: str, *, cache: Path | None = None, progress: Callable[[str], None] | None = None
) -> DomainPairs:
    """Read a domain's pairs, downloading its asset if need be.

    The side of a document depends on its text alone, and equal documents or queries are kept once.

    Args:
        name: A name of `PAIRS`.
        cache: Another cache folder than `pipelines.assets.cache_folder`.
        progress: Told what is being fetched.

    Raises:
        UnknownNameError: There is no such domain.
        AssetError: Its asset cannot be had.
    """
    if name not in PAIRS:
        raise unknown_name("domain of pairs", name, PAIRS)
    source = PAIRS[name]
    files = asset_files(source.asset, cache=cache, progress=progress) if source.asset else ()
    pairs = sorted(_unique(source.read(files)), key=lambda pair: draw(pair.id))
    return DomainPairs(
        name=name,
        training=tuple(pair for pair in pairs if draw(pair.document) >= _HELD_OUT),
        held_out=tuple(pair for pair in pairs if draw(pair.document) < _HELD_OUT),
        license=source.license,
        source=source.source,
    )


def _unique(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Each query, and each document, once: nothing else may answer a query."""
    seen: set[str] = set()
    for pair in pairs:
        keys = {f"{side}:{' '.join(text.split()).casefold()}" for side, text in
                (("query", pair.query), ("document", pair.document), ("id", pair.id))}  # fmt: skip
        if not keys & seen:
            seen |= keys
            yield pair


# ---------------------------------------------------------------- ICD-10-CM: a term that a code includes, its title


def _read_icd(files: Sequence[Path]) -> Iterator[Pair]:
    """The first inclusion term of every code."""
    for path in files:
        for diagnosis in ElementTree.parse(path).getroot().iter("diag"):
            code, title = diagnosis.findtext("name") or "", diagnosis.findtext("desc") or ""
            for number, note in enumerate(diagnosis.findall("inclusionTerm/note")):
                if number == 0 and note.text and title and note.text.casefold() != title.casefold():
                    yield Pair(id=code, query=note.text, document=title)


# ---------------------------------------------------------------- Python: docstrings, bodies, examples

_SHORTEST_QUERY = 20
_SHORTEST_EXAMPLE = 30
_LONGEST_BODY = 1500
_NOT_LIBRARY = re.compile(
    r"(^|/)(tests?|testing|conftest\.py|benchmarks|_vendor|idle_test|lib2to3|site-packages)(/|$)|/test_"
)
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _functions(
    root: Path, kinds: tuple[type[Function], ...], *, holding: str = ""
) -> Iterator[tuple[str, Function, str]]:
    """Yield where, what and the text of the file for every documented definition below a folder.

    Files without the text ``holding`` are not parsed, which takes most of the time.
    """
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if _NOT_LIBRARY.search(f"/{name}"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if holding not in text:
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, kinds) and ast.get_docstring(node):
                yield f"{name}:{node.name}", node, text


def _masked(text: str, name: str) -> str:
    """Text in which the definition's own name says nothing."""
    return re.sub(rf"\b{re.escape(name)}\b", "f", text)


def _read_functions(files: Sequence[Path]) -> Iterator[Pair]:
    """The first paragraph of a docstring, and the function without docstring and name."""
    root = Path(sysconfig.get_path("stdlib"))
    for where, node, text in _functions(root, (ast.FunctionDef, ast.AsyncFunctionDef)):
        paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
        first = node.body[0]
        lines = text.splitlines()
        body = "\n".join(
            [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or 0 : node.end_lineno]]
        )
        if len(paragraph) >= _SHORTEST_QUERY and len(node.body) > 2 and len(body) <= _LONGEST_BODY:
            yield Pair(
                id=where,
                query=_cut(_masked(paragraph, node.name), 200),
                document=_masked(body, node.name)[:400],
            )


def _read_examples(package: str) -> Callable[[Sequence[Path]], Iterator[Pair]]:
    """What a docstring says in words, and what its example types in."""

    def read(files: Sequence[Path]) -> Iterator[Pair]:
        root = Path(sysconfig.get_path("purelib")) / package
        if not root.is_dir():
            raise AssetError(
                f"The package {package} is not installed, whose documentation this domain is made of."
            )
        for where, node, _ in _functions(root, (ast.FunctionDef, ast.ClassDef), holding=">>>"):
            docstring = ast.get_docstring(node) or ""
            words = " ".join(docstring.partition("\n\n")[0].split())
            typed = re.findall(r"^\s*(?:>>>|\.\.\.) ?(.*)$", docstring, re.M)
            code = "\n".join(line for line in typed if line and not re.match(r"(import|from) ", line))
            if len(words) >= _SHORTEST_QUERY and len(code) >= _SHORTEST_EXAMPLE:
                yield Pair(
                    id=where,
                    query=_cut(_masked(words, node.name), 200),
                    document=_masked(code, node.name)[:300],
                )

    return read


def _cut(text: str, length: int) -> str:
    """Cut at the last blank before ``length``."""
    return text if len(text) <= length else text[: length + 1].rpartition(" ")[0]


# ---------------------------------------------------------------- prose: a sentence, and the passage it is taken out of

_PASSAGE = 700
_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"])")


def _read_passages(name: str) -> Callable[[Sequence[Path]], Iterator[Pair]]:
    """Passages of a book with one sentence of 8 to 40 words taken out, which asks for the rest."""

    def read(files: Sequence[Path]) -> Iterator[Pair]:
        (path,) = files
        passage: list[str] = []
        number = 0
        for sentence in _SENTENCE.split(" ".join(book_text(path, name).split())):
            passage.append(sentence)
            if sum(map(len, passage)) < _PASSAGE:
                continue
            fitting = [s for s in passage if 8 <= len(s.split()) <= 40]
            if fitting:
                taken = random.Random(f"{name}/{number}").choice(fitting)
                rest = " ".join(s for s in passage if s != taken)
                yield Pair(id=f"{name}/{number}", query=taken, document=rest)
            passage, number = [], number + 1

    return read


# ---------------------------------------------------------------- news: a headline, and its article


def _read_news(files: Sequence[Path]) -> Iterator[Pair]:
    """Headline and article, as they stand in one file."""
    for path in files:
        headline, _, article = path.read_text(encoding="utf-8", errors="replace").strip().partition("\n")
        if headline.strip() and len(article.split()) >= 30:
            yield Pair(id=path.stem, query=headline.strip(), document=" ".join(article.split())[:2000])


def _examples(package: str, license: str) -> PairSource:
    return PairSource(
        read=_read_examples(package),
        asset=None,
        license=license,
        source=f"The docstrings of the installed {package}: a description in words, and an example, names masked.",
    )


PAIRS: dict[str, PairSource] = {
    "icd10": PairSource(
        read=_read_icd,
        asset="icd10cm",
        license="LicenseRef-US-Government-Work",
        source="ICD-10-CM: a term that a code includes, and the code's title.",
    ),
    "functions": PairSource(
        read=_read_functions,
        asset=None,
        license="PSF-2.0",
        source="The running Python's standard library: a docstring's first paragraph, and the function, name masked.",
    ),
    "sympy": _examples("sympy", "BSD-3-Clause"),
    "networkx": _examples("networkx", "BSD-3-Clause"),
    "torch": _examples("torch", "BSD-3-Clause"),
    "scipy": _examples("scipy", "BSD-3-Clause"),
    "pandas": _examples("pandas", "BSD-3-Clause"),
    "sklearn": _examples("sklearn", "BSD-3-Clause"),
    "surgery": PairSource(
        read=_read_passages("surgery"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="A manual of surgery: a sentence, and the passage that it was taken out of.",
    ),
    "history": PairSource(
        read=_read_passages("history"),
        asset="gutenberg",
        license="LicenseRef-Public-Domain",
        source="A history of the United States: a sentence, and the passage that it was taken out of.",
    ),
    "news": PairSource(
        read=_read_news,
        asset="bbc-news",
        license="LicenseRef-BBC-Research",
        source="News of 2004 and 2005: a headline, and its article. For measuring only.",
    ),
}
"""Every domain's pairs by name."""
