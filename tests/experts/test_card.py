from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import pytest

from experts.card import ExpertCard
from experts.errors import CardError
from experts.license import check_license

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "format_version": 1,
        "library_version": "0.1.0",
        "name": "acme/contracts",
        "version": 1,
        "owner": "acme",
        "domain": "law",
        "kind": "lora",
        "license": "Apache-2.0",
        "base": {"name": "pico", "fingerprint": ONE, "tokenizer_fingerprint": TWO},
        "layers": [1, 2],
        "rank": 4,
        "files": [{"path": "a.safetensors", "size": 7, "sha256": THREE}],
        "training": {"method": "lora", "tokens": 10, "steps": 2},
    } | changes


def test_round_trip_and_digest() -> None:
    card = ExpertCard.create(**fields())
    data = card.to_bytes()
    assert ExpertCard.from_bytes(data) == card
    assert card.digest == hashlib.sha256(data).hexdigest()
    assert ExpertCard.from_bytes(data).digest == card.digest
    # RFC 8785: sorted keys, no white space; the standard library's writer agrees on plain ASCII without floats
    assert data == json.dumps(json.loads(data), sort_keys=True, separators=(",", ":")).encode()


def test_every_field_is_spelled_out() -> None:
    card = ExpertCard.create(**fields())
    assert set(json.loads(card.to_bytes())) == set(ExpertCard.model_fields)


def test_a_new_optional_field_does_not_change_old_digests() -> None:
    class NextCard(ExpertCard):
        hardware: str = "unknown"

    old = ExpertCard.create(**fields())
    assert NextCard.from_bytes(old.to_bytes()).digest == old.digest


def test_not_canonical() -> None:
    card = ExpertCard.create(**fields())
    pretty = json.dumps(json.loads(card.to_bytes()), indent=1).encode()
    with pytest.raises(CardError) as caught:
        ExpertCard.from_bytes(pretty)
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"card.json is not in canonical form (RFC 8785): its sha256 is {hashlib.sha256(pretty).hexdigest()}, the "
        f"card's digest {card.digest}. Pack the expert again instead of editing its card."
    )


def test_every_flipped_bit_is_seen() -> None:
    card = ExpertCard.create(**fields())
    data = card.to_bytes()
    for position in range(0, len(data) * 8, 7):
        mutant = bytearray(data)
        mutant[position // 8] ^= 1 << position % 8
        try:
            other = ExpertCard.from_bytes(bytes(mutant))
        except CardError:
            continue
        assert other.digest != card.digest


NAME_RULE = (
    "write owner/expert, for instance 'acme/contracts', each part 1 to 64 lower-case letters, digits, '_', '.' or "
    "'-', starting with a letter or digit."
)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown keys": (
        {"licence": "MIT", "base": {"name": "p", "fingerprnt": ONE, "tokenizer_fingerprint": TWO}},
        [
            "base.fingerprint: missing",
            "base.fingerprnt: unknown key; did you mean 'fingerprint'? Allowed: embedding, fingerprint, name, "
            "revision, tokenizer_fingerprint",
            "licence: unknown key; did you mean 'license'? Allowed: base, derived_from, description, domain, files, "
            "format_version, kind, layers, library_version, license, metrics, name, optout_class, owner, rank, "
            "routing, terms, training, version",
        ],
    ),
    "format version": ({"format_version": 2}, ["format_version: input should be 1, given 2"]),
    "strict types": (
        {"version": "1", "rank": 4.0, "metrics": {"nll": "low"}},
        [
            "version: input should be a valid integer, given '1'",
            "rank: input should be a valid integer, given 4.0",
            "metrics.nll: input should be a valid number, given 'low'",
        ],
    ),
    "bad name": ({"name": "Acme"}, [f"name: 'Acme' is not an expert name: {NAME_RULE}"]),
    "another owner": (
        {"owner": "hosp"},
        ["owner is 'hosp', but the name 'acme/contracts' belongs to 'acme'"],
    ),
    "layers": ({"layers": [2, 1]}, ["layers: layers must ascend without repetition"]),
    "files": (
        {
            "files": [
                {"path": p, "size": 1, "sha256": ONE}
                for p in ("../x", "/x", "A.json", "a.json", "card.json", "con.txt", "x y", "ä")
            ]
        },
        [
            "files: path '../x': leaves the folder or is not relative; write it relative to the folder, without '.' "
            "and '..'; path '/x': leaves the folder or is not relative; write it relative to the folder, without "
            "'.' and '..'; path 'a.json': differs from 'A.json' in case only; rename one of them; path 'con.txt': "
            "contains a name that Windows reserves for a device; path 'x y': only letters A-Z a-z, digits, '.', '_' "
            "and '-' are allowed, in segments joined by '/'; path 'ä': only letters A-Z a-z, digits, '.', '_' and "
            "'-' are allowed, in segments joined by '/'; card.json cannot list itself"
        ],
    ),
    "privacy": (
        {
            "training": {
                "method": "x",
                "privacy": {"epsilon": -1, "delta": 2.0, "unit": "token", "accountant": "p"},
            }
        },
        [
            "training.privacy.epsilon: input should be greater than 0, given -1",
            "training.privacy.delta: input should be less than 1, given 2.0",
            "training.privacy.unit: input should be 'record', 'document' or 'user', given 'token'",
        ],
    ),
    "domain": (
        {"domain": "a/b"},
        ["domain: string should match pattern '^[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}$', given 'a/b'"],
    ),
}


@pytest.mark.parametrize(("changes", "problems"), REFUSED.values(), ids=REFUSED)
def test_refused(changes: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(CardError) as caught:
        ExpertCard.create(**fields(**changes))
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = "".join(f"\n  - {problem}" for problem in problems)
    name = changes.get("name", "acme/contracts")
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"Card of expert '{name}' has {count}:{lines}"


ABSOLUTE = [
    "/home/ann/data",
    "trained on /home/ann/data",
    "path:/mnt/x",
    "see (/srv/records/2024)",
    "~/data",
    "from ~ann/data",
    "C:\\data",
    "D:/data",
    "\\\\server\\share",
    "file:///data",
]
HARMLESS = [
    "https://example.org/a/b",
    "and/or",
    "ratio 3/4",
    "contracts (law/commerce)",
    "a ~ b",
    "see acme/contracts@1",
    "half / whole",
]


@pytest.mark.parametrize("text", ABSOLUTE)
@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("description", lambda text: {"description": text}),
        ("training.settings.data", lambda text: {"training": {"method": "m", "settings": {"data": text}}}),
        ("base.name", lambda text: {"base": fields()["base"] | {"name": text}}),
        ("a key of metrics", lambda text: {"metrics": {text: 1.0}}),
    ],
)
def test_no_absolute_path(text: str, place: str, changes: Any) -> None:
    with pytest.raises(CardError) as caught:
        ExpertCard.create(**fields(**changes(text)))
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"Card of expert 'acme/contracts' has 1 problem:\n  - {place} contains the absolute path {text!r}; a card is "
        "public and names no place on a machine"
    )


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text(text: str) -> None:
    assert ExpertCard.create(**fields(description=text)).description == text


def test_reading_is_fast() -> None:
    data = ExpertCard.create(**fields()).to_bytes()
    started = time.perf_counter()
    for _ in range(20):
        ExpertCard.from_bytes(data)
    assert (time.perf_counter() - started) / 20 < 0.02


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        ("Apache-2.0", "Apache-2.0"),
        ("mit or apache-2.0", "MIT OR Apache-2.0"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "GPL-2.0-only WITH Classpath-exception-2.0"),
        ("LicenseRef-acme-terms", "LicenseRef-acme-terms"),
        ("LicenseRef-acme.2 AND MIT", "LicenseRef-acme.2 AND MIT"),
    ],
)
def test_license(given: str, canonical: str) -> None:
    assert check_license(given) == canonical


ADVICE = "write for instance 'Apache-2.0' or, for terms of your own, 'LicenseRef-<name>'."


@pytest.mark.parametrize(
    ("given", "problems"),
    [
        ("Apachee-2.0", "\n  - unknown licence 'Apachee-2.0'; did you mean 'Apache-2.0'?"),
        ("MIT OR Foo", "\n  - unknown licence 'Foo'"),
        ("MIT AND", ""),
        ("(MIT", ""),
        ("", ""),
        ("  ", ""),
    ],
)
def test_license_refused(given: str, problems: str) -> None:
    with pytest.raises(CardError) as caught:
        check_license(given)
    assert caught.value.exit_code == 2
    assert str(caught.value) == f"'{given}' is not an SPDX licence expression; {ADVICE}{problems}"
