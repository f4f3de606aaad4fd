"""The sealed wrapper: what comes out of a task that prints, raises, or reports too much."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pipelines.train.sealed import SealedResult, sealed


@pytest.fixture
def log(tmp_path):
    return tmp_path / "private" / "train.log"


def test_numbers_come_out(log, capfd):
    result = sealed(lambda: {"loss": 1.25, "step": 3}, log=log)
    assert result == SealedResult(scalars={"loss": 1.25, "step": 3})
    assert capfd.readouterr() == ("", "")


def test_what_is_printed_goes_to_the_owners_log(log, capfd):
    def task():
        sys.stdout.write("secret one\n")
        os.write(2, b"secret two\n")
        subprocess.run(["echo", "secret three"], check=True)
        return {}

    sealed(task, log=log)
    sys.stdout.write("afterwards\n")
    assert capfd.readouterr() == ("afterwards\n", "")
    text = log.read_text()
    assert all(word in text for word in ("secret one", "secret two", "secret three"))
    assert log.stat().st_mode & 0o777 == 0o600


def test_only_the_class_of_an_error_comes_out(log):
    def task():
        try:
            int("the secret is 42")
        except ValueError as error:
            raise KeyError("secret") from error

    result = sealed(task, log=log)
    assert result == SealedResult(error="KeyError")
    assert result.to_wire() == {"scalars": {}, "error": "KeyError"}
    assert "the secret is 42" in log.read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupts_are_sealed_too(log, error):
    def task():
        raise error("secret")

    assert sealed(task, log=log) == SealedResult(error=error.__name__)


@pytest.mark.parametrize("values", [{"the secret": 1.0}, {"loss": "secret"}, {"loss": float("nan")}])
def test_a_result_outside_the_list_does_not_come_out(log, values):
    assert sealed(lambda: values, log=log) == SealedResult(error="ValueError")


def test_the_log_is_not_followed_through_a_link(log, tmp_path):
    log.parent.mkdir()
    log.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        sealed(dict, log=log)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(
    "body",
    [
        {"scalars": {}, "error": None, "message": "secret"},
        {"scalars": {"secret": 1}, "error": None},
        {"scalars": {}, "error": "secret"},
        {"scalars": "secret", "error": None},
    ],
)
def test_a_result_from_elsewhere_is_not_trusted(body):
    with pytest.raises(ValueError, match=r"sealed result|reported"):
        SealedResult.from_wire(body)
