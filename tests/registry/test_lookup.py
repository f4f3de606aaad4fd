"""Finding experts by reference and by property."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from experts.errors import UnknownNameError
from registry import Registry


@pytest.fixture(scope="module")
def library_folder(build_library: Any, make_expert: Any) -> Path:
    def fill(registry: Registry) -> None:
        registry.register(make_expert("acme/contracts", version=1, domain="law", seed=1))
        registry.register(make_expert("acme/contracts", version=2, domain="law", seed=2))
        registry.register(make_expert("acme/python", domain="code", seed=3))
        registry.register(make_expert("hosp/icd", version=7, domain="medicine", seed=4))

    return build_library(fill)


@pytest.fixture
def library(library_folder: Path, open_copy: Any) -> Registry:
    return open_copy(library_folder)


def refs(library: Registry, **filters: Any) -> list[str]:
    return [record.ref for record in library.experts(**filters)]


def test_the_newest_version_of_each_is_listed_by_name(library: Registry) -> None:
    assert refs(library) == ["acme/contracts@2", "acme/python@1", "hosp/icd@7"]
    assert refs(library, all_versions=True)[:2] == ["acme/contracts@1", "acme/contracts@2"]
    assert [record.sequence for record in library.experts(all_versions=True)] == [1, 2, 3, 4]


def test_filters_combine(library: Registry) -> None:
    assert refs(library, owner="acme") == ["acme/contracts@2", "acme/python@1"]
    assert refs(library, owner="acme", domain="code") == ["acme/python@1"]
    assert refs(library, kind="lora", base="pico", domain="medicine") == ["hosp/icd@7"]
    assert refs(library, owner="hosp", domain="code") == []
    assert refs(library, kind="ffn") == []


def test_a_filter_looks_at_the_newest_version_only(library: Registry, make_expert: Any) -> None:
    library.register(make_expert("acme/python", version=2, domain="law", seed=5))
    assert refs(library, domain="law") == ["acme/contracts@2", "acme/python@2"]
    assert refs(library, domain="code") == []
    assert refs(library, domain="code", all_versions=True) == ["acme/python@1"]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"domain": "lwa"}, "Unknown domain 'lwa'. Did you mean 'law'? Known: code, law, medicine."),
        ({"owner": "acem"}, "Unknown owner 'acem'. Did you mean 'acme'? Known: acme, hosp."),
        ({"base": "pcio"}, "Unknown base 'pcio'. Did you mean 'pico'? Known: pico."),
        ({"kind": "lara"}, "Unknown kind 'lara'. Did you mean 'lora'? Known: dense, ffn, lora, retriever."),
    ],
    ids=["domain", "owner", "base", "kind"],
)
def test_an_unknown_filter_is_an_error(library: Registry, filters: dict[str, str], message: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        library.experts(**filters)
    assert str(caught.value) == f"{message} The registry is '{library.path}'."


def test_references(library: Registry) -> None:
    first, second = (library.expert(f"acme/contracts@{version}") for version in (1, 2))
    assert (first.version, second.version) == (1, 2)
    assert library.expert("acme/contracts") == second
    assert library.expert("acme/contracts@01") == first
    assert library.expert(f"acme/contracts@sha256:{first.digest}") == first


def test_an_unknown_expert_is_named_with_the_nearest(library: Registry) -> None:
    with pytest.raises(UnknownNameError) as caught:
        library.expert("acme/contract@1")
    assert str(caught.value) == (
        "Unknown expert 'acme/contract'. Did you mean 'acme/contracts'? Known: acme/contracts, acme/python, "
        f"hosp/icd. The registry is '{library.path}'."
    )


@pytest.mark.parametrize("label", ["3", "0", f"sha256:{'0' * 64}"])
def test_an_unknown_version_lists_the_versions(library: Registry, label: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        library.expert(f"acme/contracts@{label}")
    assert str(caught.value) == (
        f"Expert 'acme/contracts' has no version '{label}'. It has: 1, 2. Leave out '@...' for the newest."
    )


def test_a_malformed_reference_is_refused(library: Registry) -> None:
    with pytest.raises(UnknownNameError) as caught:
        library.expert("acme")
    assert str(caught.value) == (
        "'acme' is not an expert name: write owner/expert, for instance 'acme/contracts', each part 1 to 64 "
        "lower-case letters, digits, '_', '.' or '-', starting with a letter or digit."
    )


def test_the_next_version(library: Registry) -> None:
    assert library.next_version("hosp/icd") == 8
    assert library.next_version("hosp/new") == 1


def test_experts_of_an_owner_who_is_out_are_marked(library: Registry) -> None:
    library.opt_out("acme", reason="left")
    assert {record.ref: record.opted_out for record in library.experts()} == {
        "acme/contracts@2": True,
        "acme/python@1": True,
        "hosp/icd@7": False,
    }
    assert library.expert("acme/contracts@1").opted_out


def test_a_list_opens_no_blob_and_asks_a_fixed_number_of_questions(library: Registry) -> None:
    """What keeps a list of ten thousand experts under a second."""
    statements: list[str] = []
    sa.event.listen(
        library._storage.index.engine, "before_cursor_execute", lambda *call: statements.append(call[2])
    )
    listed = library.experts()
    shutil.rmtree(library.path / "blobs")
    assert library.experts() == listed
    assert len(statements) == 2 * 6  # begin, schema, revision, head of the log, consents, experts
