"""The consent ledger: only added to, current state derived."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import Any

import pytest

from experts.errors import RegistryError, UnknownNameError
from registry import ConsentRecord, OptOut, Registry


@pytest.fixture(scope="module")
def library_folder(build_library: Any, make_expert: Any) -> Path:
    def fill(registry: Registry) -> None:
        for name in ("acme/contracts", "hosp/icd", "soft/python"):
            registry.register(make_expert(name))

    return build_library(fill)


@pytest.fixture
def library(library_folder: Path, open_copy: Any) -> Registry:
    return open_copy(library_folder)


def test_out_and_in_and_out_again(library: Registry) -> None:
    first = library.opt_out("acme", reason="contract ended", by="ann")
    assert first == OptOut(owner="acme", when="2026-01-31T13:00:00Z", who="ann", reason="contract ended")
    assert library.opt_outs() == [first]
    back = library.opt_in("acme", reason="renewed", by="bob")
    assert back == ConsentRecord(
        sequence=6, owner="acme", action="opt_in", when="2026-01-31T13:01:00Z", who="bob", reason="renewed"
    )
    assert library.opt_outs() == []
    again = library.opt_out("acme", reason="ended again", by="ann")
    assert library.opt_outs() == [again]
    history = library.opt_out_history()
    assert history[1] == back
    assert [(record.action, record.who, record.reason, record.when) for record in history] == [
        ("opt_out", "ann", "contract ended", "2026-01-31T13:00:00Z"),
        ("opt_in", "bob", "renewed", "2026-01-31T13:01:00Z"),
        ("opt_out", "ann", "ended again", "2026-01-31T13:02:00Z"),
    ]
    assert library.owners() == {"acme", "hosp", "soft"}


def test_owners_leave_independently(library: Registry) -> None:
    library.opt_out("hosp", reason="a")
    library.opt_out("acme", reason="b")
    library.opt_in("hosp", reason="c")
    library.opt_out("soft", reason="d")
    assert [record.owner for record in library.opt_outs()] == ["acme", "soft"]


def test_who_is_the_user_by_default(library: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "carol")
    assert library.opt_out("acme", reason="x").who == "carol" == getpass.getuser()

    def nobody() -> str:
        raise KeyError("no such user")

    monkeypatch.setattr(getpass, "getuser", nobody)
    monkeypatch.setattr("os.getuid", lambda: 4242)
    assert library.opt_in("acme", reason="x").who == "uid 4242"


def test_opting_out_twice_says_who_when_and_why(library: Registry) -> None:
    library.opt_out("acme", reason="contract ended", by="ann")
    with pytest.raises(RegistryError) as caught:
        library.opt_out("acme", reason="once more", by="bob")
    assert str(caught.value) == (
        "'acme' is opted out already: since 2026-01-31T13:00:00Z, by ann, because: contract ended. Nothing "
        "was changed."
    )
    assert len(library.opt_out_history()) == 1


def test_opting_in_needs_an_opt_out(library: Registry) -> None:
    with pytest.raises(RegistryError) as caught:
        library.opt_in("acme", reason="x")
    assert str(caught.value) == (
        "'acme' is not opted out, so there is no opt-out to take back. Opted out now: nobody."
    )
    library.opt_out("hosp", reason="x")
    library.opt_out("soft", reason="x")
    with pytest.raises(RegistryError) as caught:
        library.opt_in("acme", reason="x")
    assert str(caught.value) == (
        "'acme' is not opted out, so there is no opt-out to take back. Opted out now: hosp, soft."
    )


@pytest.mark.parametrize("verb", ["opt_out", "opt_in"])
def test_an_unknown_owner_is_named_with_the_nearest(library: Registry, verb: str) -> None:
    with pytest.raises(UnknownNameError) as caught:
        getattr(library, verb)("acne", reason="x")
    anyway = (
        " The opt-out was not recorded. Somebody else, whose text was tuned on or whose documents are in an index, "
        "opts out with --unknown-owner (allow_unknown=True)."
    )
    assert str(caught.value) == (
        "Unknown owner 'acne'. Did you mean 'acme'? Known: acme, hosp, soft. Owners are those with an "
        f"expert in the registry '{library.path}'.{anyway if verb == 'opt_out' else ''}"
    )


def test_somebody_without_an_expert_opts_out_and_in(library: Registry) -> None:
    """An owner of text or of documents; whoever was in the ledger once is known."""
    library.opt_out("word", reason="no more", allow_unknown=True)
    assert [record.owner for record in library.opt_outs()] == ["word"]
    assert library.owners() == {"acme", "hosp", "soft"}
    assert library.fsck(rebuild=True).ok
    library.opt_in("word", reason="back")
    assert library.opt_outs() == []
    library.opt_out("word", reason="again")
    assert [record.owner for record in library.opt_outs()] == ["word"]
    with pytest.raises(
        UnknownNameError, match=r"'Word' is not an owner name: use 1 to 64 lower-case letters"
    ):
        library.opt_out("Word", reason="x", allow_unknown=True)


@pytest.mark.parametrize("reason", ["", "  ", "two\nlines", "\x1b[31mred", "x" * 2001])
def test_a_reason_is_one_printable_line(library: Registry, reason: str) -> None:
    with pytest.raises(RegistryError) as caught:
        library.opt_out("acme", reason=reason)
    assert str(caught.value) == (
        f"The reason of a consent record is {reason.strip()[:40]!r}: write 1 to 2000 printable characters "
        "on one line."
    )
    with pytest.raises(RegistryError) as caught:
        library.opt_out("acme", reason="fine", by="\n")
    assert str(caught.value) == (
        "The name of who does it of a consent record is '': write 1 to 200 printable characters on one line."
    )
    assert library.opt_outs() == []
