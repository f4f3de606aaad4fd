"""What may be said by a job, and that nothing else passes."""

from __future__ import annotations

import json

import pytest

from experts.errors import DataError
from pipelines.train.progress import Progress, allowed_scalars, error_name


def test_a_report_survives_the_pipe():
    report = Progress(name="acme/a", stage="training", scalars={"step": 3, "loss": 2.3456789123})
    read = Progress.from_line(report.to_line(), name="acme/a")
    assert read == Progress(name="acme/a", stage="training", scalars={"step": 3, "loss": 2.34568})
    assert "acme" not in report.to_line()


@pytest.mark.parametrize(
    "body",
    [
        {"stage": "training", "scalars": {"secret": 1}, "error": None},
        {"stage": "training", "scalars": {"loss": "secret"}, "error": None},
        {"stage": "training", "scalars": {"loss": True}, "error": None},
        {"stage": "secret", "scalars": {}, "error": None},
        {"stage": "failed", "scalars": {}, "error": "secret"},
        {"stage": "failed", "scalars": {}, "error": None, "message": "secret"},
        {"stage": "failed", "scalars": [], "error": None},
        ["training"],
    ],
)
def test_a_line_with_anything_else_is_refused_and_not_quoted(body):
    with pytest.raises(ValueError, match=r"progress line|reported") as caught:
        Progress.from_line(json.dumps(body), name="acme/a")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "1", [1]])
def test_only_finite_numbers_are_scalars(value):
    with pytest.raises(ValueError, match=r"^a reported value is not a finite number$"):
        allowed_scalars({"loss": value})


def test_an_error_is_reduced_to_a_class_name_from_the_list():
    hostile = type("The secret is 42", (KeyError,), {})
    assert error_name(hostile("secret")) == "KeyError"
    assert error_name(DataError("secret")) == "DataError"
    assert error_name(type("Secret", (Exception,), {})()) == "Exception"
    assert error_name(KeyboardInterrupt()) == "KeyboardInterrupt"
