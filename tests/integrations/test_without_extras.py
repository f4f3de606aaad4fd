"""An adapter whose extra is not installed says which one to install."""

from __future__ import annotations

import sys

import pytest


def test_missing_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "pipelines.integrations.lm_eval", raising=False)
    with pytest.raises(ImportError) as caught:
        import pipelines.integrations.lm_eval  # noqa: F401
    assert str(caught.value) == (
        "lm-evaluation-harness is not installed. Install the extra: pip install 'coterie[lm-eval]'."
    )
