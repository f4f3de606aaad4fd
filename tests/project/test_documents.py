"""The commands and programs in the documents are run, in the order in which they are written.

Every fenced block of a language below is preceded by a comment that says what is done with it:

    <!-- test: run -->             it is run; what it prints may differ from what is shown
    <!-- test: same -->            it is run, and prints what is shown, apart from numbers and digests; a line
                                   ``...`` stands for any number of lines
    <!-- test: file PATH -->       it shows that file of the repository
    <!-- test: save NAME -->       it is saved under that name for the blocks below
    <!-- test: skip, REASON -->    it is not run

In a console block, lines that start with ``$`` are commands (``coterie`` and ``export`` only), the others are
output. A document is read in a folder such as one has after ``make demo``, on a pico model.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from composer.recipes import RECIPES
from composer.routing.scorers import SCORERS
from composer.routing.selectors import SELECTORS

ROOT = Path(__file__).parents[2]
LANGUAGES = ("console", "python", "yaml")
FENCE = re.compile(
    r"(?:<!-- test: (?P<mark>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block: where it is, what it is, what its mark says, and its text."""

    place: str
    language: str
    mark: str
    text: str


def blocks(text: str, name: str) -> Iterator[Block]:
    """Yield the blocks that need a mark."""
    for match in FENCE.finditer(text):
        if match["language"] in LANGUAGES:
            line = text.count("\n", 0, match.start("text"))
            yield Block(
                place=f"{name}:{line}",
                language=match["language"],
                mark=match["mark"] or "",
                text=match["text"],
            )


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each command of a console block with the lines of output shown below it."""
    command, shown = "", []
    for line in text.splitlines():
        if line.startswith("$ "):
            if command:
                yield command, shown
            command, shown = line[2:], []
        else:
            shown.append(line)
    yield command, shown


def normal(line: str) -> str:
    """Replace what differs between models: digests, numbers with their units, the width of columns."""
    line = re.sub(r"\b[0-9a-f]{12,64}\b|\d{4}-\d\d-\d\dT[\d:]+Z", "#", line)
    line = re.sub(r"\b\d[\d,]*(\.\d+)?(e[+-]\d+)?(%| (bytes|kB|MB|GB|k|M|G|s)\b)?", "#", line)
    return " ".join(line.split())


def same(printed: list[str], shown: list[str]) -> bool:
    """Compare output with what is shown, where ``...`` stands for any number of lines."""
    parts = "\n".join("[^\0]*" if line.strip() == "..." else re.escape(normal(line)) for line in shown)
    return re.fullmatch(parts, "\n".join(map(normal, printed))) is not None


def expanded(word: str, folder: Path) -> list[str]:
    """Do what a shell does with ``*``."""
    return sorted(str(path.relative_to(folder)) for path in folder.glob(word)) if "*" in word else [word]


def run_console(block: Block, folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command, shown in commands(block.text):
        words = [found for word in shlex.split(command) for found in expanded(word, folder)]
        if words[0] == "export":
            variable, _, value = words[1].partition("=")
            monkeypatch.setenv(variable, value)
            continue
        assert words[0] == "coterie", f"{block.place}: only coterie and export can be run: {command}"
        printed = run(folder, *words[1:]).splitlines()
        if block.mark == "same":
            assert same(printed, shown), f"{block.place}: {command} now prints\n" + "\n".join(printed)


def run_block(block: Block, folder: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, _, rest = block.mark.partition(" ")
    if kind == "skip,":
        assert rest, f"{block.place}: say why it is not run"
    elif kind == "file":
        assert block.text == (ROOT / rest).read_text(), f"{block.place}: differs from {rest}"
    elif kind == "save":
        (folder / rest).write_text(block.text)
    elif block.language == "console":
        run_console(block, folder, run, monkeypatch)
    elif block.language == "python":
        exec(compile(block.text, block.place, "exec"), {"__name__": "document"})
    else:
        raise AssertionError(f"{block.place}: a {block.language} block can be shown from a file or skipped")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/own-experts.md"])
def test_document(
    name: str,
    workplace: Path,
    run_coterie: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = Path(shutil.copytree(workplace, tmp_path / "here"))
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for table in (SCORERS, SELECTORS, RECIPES):  # a document may add a row
        monkeypatch.setattr(table, "builtin", dict(table.builtin))
    found = list(blocks((ROOT / name).read_text(), name))
    assert found
    for block in found:
        assert re.fullmatch(r"run|same|(file|save) \S+|skip, .+", block.mark), (
            f"{block.place}: no mark, or an unknown one"
        )
        run_block(block, folder, run_coterie, monkeypatch)


def test_manifests_in_other_documents_are_read() -> None:
    """Their blocks need what no test has; a manifest among them can be read all the same."""
    from composer.manifest import Manifest

    text = (ROOT / "docs" / "upcycling.md").read_text()
    read = [
        Manifest.from_dict(yaml.safe_load(b.text)) for b in blocks(text, "upcycling") if b.language == "yaml"
    ]
    assert [manifest.recipe for manifest in read] == ["bam"]


def test_links_in_documents_lead_somewhere() -> None:
    more = [str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")]
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", *more):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / document).read_text()):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


class TestTheRunner:
    """The runner itself can fail."""

    def test_marks(self) -> None:
        text = "x\n<!-- test: run -->\n```console\n$ a\nb\n```\n```python\npass\n```\n```text\nz\n```\n"
        assert [(b.place, b.language, b.mark, b.text) for b in blocks(text, "D")] == [
            ("D:3", "console", "run", "$ a\nb\n"),
            ("D:7", "python", "", "pass\n"),
        ]

    def test_commands(self) -> None:
        assert list(commands("$ a 'b c'\nx\ny\n$ d\n")) == [("a 'b c'", ["x", "y"]), ("d", [])]

    @pytest.mark.parametrize(
        ("printed", "shown", "equal"),
        [
            (
                ["Built a: 3 experts, 269.1 MB linked in 0.02 s."],
                ["Built a: 2 experts, 1.4 kB linked in 1.00 s."],
                True,
            ),
            (["Built a: 3 experts"], ["Built b: 3 experts"], False),
            (["a   b", "c"], ["a b", "..."], True),
            (["a", "b", "c"], ["a", "...", "c"], True),
            (["a", "b"], ["a"], False),
            (["digest 0123456789abcdef"], ["digest fedcba9876543210"], True),
        ],
    )
    def test_comparison(self, printed: list[str], shown: list[str], equal: bool) -> None:
        assert same(printed, shown) is equal

    def test_a_command_that_fails_is_noticed(
        self, tmp_path: Path, run_coterie: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        block = Block(place="D:1", language="console", mark="run", text="$ coterie show acme/none\n")
        monkeypatch.setenv("COTERIE_REGISTRY", str(tmp_path / "none"))
        with pytest.raises(
            AssertionError, match=r"coterie show acme/none\n\s*Error: Unknown expert 'acme/none'"
        ):
            run_block(block, tmp_path, run_coterie, monkeypatch)
