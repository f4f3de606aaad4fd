"""Checking SPDX licence expressions.

Imports the licence index only when asked, because it takes longer than everything else about a card. Knows
the SPDX list; knows nothing of which licences go together.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from experts.errors import CardError
from experts.files import capped

__all__ = ["check_license"]

_CUSTOM = re.compile(r"LicenseRef-[A-Za-z0-9.-]+")


def check_license(expression: str) -> str:
    """Return the expression in SPDX's own spelling.

    Args:
        expression: For instance ``"Apache-2.0"``, ``"MIT OR Apache-2.0"`` or ``"LicenseRef-acme-terms"``.

    Raises:
        CardError: Not an SPDX expression; the unknown identifiers are named with the nearest known ones.
    """
    from license_expression import ExpressionError, ParseError

    licensing = _licensing()
    # a custom reference is valid SPDX, but in no index: a known licence stands in for it while checking
    probe = _CUSTOM.sub("MIT", expression)
    advice = "write for instance 'Apache-2.0' or, for terms of your own, 'LicenseRef-<name>'."
    try:
        unknown = [str(key) for key in licensing.unknown_license_keys(probe)]
        valid = not unknown and licensing.parse(probe, validate=True, strict=True) is not None
    except (ExpressionError, ParseError):
        unknown, valid = [], False
    if not valid:
        raise CardError(
            f"'{expression}' is not an SPDX licence expression; {advice}",
            problems=capped([f"unknown licence '{word}'{_nearest(word)}" for word in unknown]),
        )
    return str(licensing.parse(expression).render())


def _nearest(word: str) -> str:
    import difflib

    known = {key.lower(): key for key in _licensing().known_symbols}
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.7)
    return f"; did you mean '{known[near[0]]}'?" if near else ""


@cache
def _licensing() -> Any:
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()
