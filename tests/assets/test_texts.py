import pytest

from experts.errors import UnknownNameError
from pipelines.assets import domain_text, texts
from pipelines.assets.texts import TextSource, families

ICD = """<ICD10CM.tabular><chapter>
<section id="A00-A09"><desc>Intestinal infectious diseases (A00-A09)</desc>
 <diag><name>A00</name><desc>Cholera</desc>
  <excludes1><note>typhoid</note></excludes1>
  <diag><name>A00.0</name><desc>Cholera due to Vibrio</desc><inclusionTerm><note>Classical</note></inclusionTerm></diag>
 </diag>
</section>
<section id="Z"><desc>Short</desc></section>
</chapter></ICD10CM.tabular>"""


def test_python_is_the_standard_library_without_tests():
    text = domain_text("python")
    documents = {*text.training, *text.held_out}
    assert len(documents) > 200
    assert not set(text.training) & set(text.held_out)
    assert 0.1 < len(text.held_out) / len(documents) < 0.3
    import json
    import unittest.case
    from pathlib import Path

    assert Path(json.__file__).read_text() in documents
    assert Path(unittest.case.__file__).read_text() in documents
    assert all(len(document) >= 1500 for document in documents)


def test_the_split_does_not_depend_on_the_other_documents(monkeypatch):
    def source(keys):
        return TextSource(
            read=lambda files: iter([(key, f"text {key}") for key in keys]),
            asset=None,
            license="MIT",
            source=".",
        )

    monkeypatch.setitem(texts.TEXTS, "many", source([f"d{i}" for i in range(200)]))
    monkeypatch.setitem(texts.TEXTS, "few", source([f"d{i}" for i in range(0, 200, 3)]))
    many, few = domain_text("many"), domain_text("few")
    assert set(few.held_out) == set(many.held_out) & {*few.training, *few.held_out}
    assert 20 < len(many.held_out) < 60


def test_families_share_a_side(monkeypatch):
    shared = " ".join(f"word{i}" for i in range(60))
    alike = [(f"alike{i}", f"{shared} and {i}") for i in range(20)]
    apart = [(f"apart{i}", " ".join(f"own{i}x{j}" for j in range(30))) for i in range(20)]
    source = TextSource(
        read=lambda files: iter([*alike, *apart]), asset=None, license="MIT", source=".", by_family=True
    )
    monkeypatch.setitem(texts.TEXTS, "like", source)
    text = domain_text("like")
    assert len(text.training) + len(text.held_out) == 40
    assert {sum(shared in document for document in side) for side in (text.training, text.held_out)} == {
        0,
        20,
    }
    assert all(any("own" in document for document in side) for side in (text.training, text.held_out))


def test_families_carry_over():
    a, b, c = (" ".join(f"{name}{i}" for i in range(40)) for name in "abc")
    assert families([f"{a} {b}", "short", f"{b} {c}", c, a]) == [0, 1, 0, 0, 0]


def test_icd_sections_keep_codes_and_notes(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_SHORTEST_SECTION", 50)
    path = tmp_path / "icd.xml"
    path.write_text(ICD)
    assert list(texts._read_icd([path])) == [
        (
            "A00-A09",
            "Intestinal infectious diseases (A00-A09)\nA00 Cholera\n  Excludes1: typhoid\n"
            "A00.0 Cholera due to Vibrio\n  Includes: Classical\n",
        )
    ]


def test_licences_leave_out_other_languages_and_notices(tmp_path):
    for name, size in {"MIT": 900, "README": 900, "CECILL-2.0": 900, "CECILL-2.1": 900, "0BSD": 100}.items():
        (tmp_path / f"{name}.txt").write_text("x" * size)
    assert [key for key, _ in texts._read_licenses(sorted(tmp_path.glob("*.txt")))] == ["CECILL-2.1", "MIT"]


def test_books_are_cut_at_their_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "_PASSAGE", 20)
    path = tmp_path / "big.txt"
    path.write_text(
        "contents\n\nBOOK ONE: 1805\n\nfirst line\nof a paragraph\n\nthe second one is long\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK, WAR AND PEACE ***\nterms"
    )
    read = texts._read_books("novel")
    assert list(read([path])) == [
        ("novel/0", "BOOK ONE: 1805\nfirst line of a paragraph\n"),
        ("novel/1", "the second one is long\n"),
    ]


def test_unknown_text_names_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        domain_text("licenses")
    assert str(caught.value) == (
        "Unknown domain text 'licenses'. Did you mean 'licences'? Known: history, icd10, licences, novel, prose, "
        "python, stories, surgery."
    )
