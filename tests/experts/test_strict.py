from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field

from experts.errors import CardError, ManifestError
from experts.strict import MAX_NODES, load_json, load_yaml, validate

YAML_REFUSED = {
    "anchor": ("a: &x 1", "m, line 1, column 4: anchor '&x' is not allowed; remove it."),
    "alias": ("a: *x", "m, line 1, column 4: alias '*x' is not allowed; write the value out."),
    "bomb": (
        "a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]",
        "m, line 1, column 4: anchor '&a' is not allowed; remove it.",
    ),
    "python tag": (
        "a: !!python/object/apply:os.system [ls]",
        "m, line 1, column 4: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed; remove it.",
    ),
    "plain tag": ("a: ! 1", "m, line 1, column 4: tag '!' is not allowed; remove it."),
    "duplicate": ("a: 1\nb: 2\na: 3", "m, line 3, column 1: key 'a' occurs twice; keep one of them."),
    "number key": ("x:\n  1: a", "m, line 2, column 3: key '1' is not a string; put it in quotes."),
    "list key": ("[a]: 1", "m, line 1, column 1: a list or a mapping is used as a key; keys are strings."),
    "infinite": ("a: .inf", "m, line 1, column 4: '.inf' is not a finite number."),
    "overflow": ("a: 1e999", "m, line 1, column 4: '1e999' is not a finite number."),
    "long integer": ("a: " + "9" * 5000, "m, line 1, column 4: an integer of more than 40 digits."),
    "two documents": (
        "a: 1\n---\nb: 2",
        "m, line 2, column 1: a second document starts here; write one document only.",
    ),
    "empty": ("# nothing\n", "m: empty; write at least one key."),
    "syntax": ("a: [1,\n", "m, line 2, column 1: not valid YAML: did not find expected node content."),
    "deep": ("a: " + "[" * 100 + "]" * 100, "m, line 1, column 35: nested more than 32 levels deep."),
    "very deep": ("[" * 100_000, "m, line 1, column 33: nested more than 32 levels deep."),
    "many": ("[" + "1," * MAX_NODES + "]", "m, line 1, column 20000: more than 10,000 values."),
    "large": ("a: " + "x" * 300_000, "m: 300,003 bytes; at most 262,144 are allowed."),
    "not UTF-8": (b"a: \xff", "m: not UTF-8 text (byte 3); save it as UTF-8."),
}


@pytest.mark.parametrize(("text", "message"), YAML_REFUSED.values(), ids=YAML_REFUSED)
def test_yaml_refused(text: str | bytes, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        load_yaml(text, what="m")
    assert str(caught.value) == message


def test_yaml_core_schema() -> None:
    text = "a: no\nb: [1, 012, 0x1f, 0o17, -3, 1e3, 1.5, .5, 1:30, 2024-01-01, '7', true, null, ~, '']\nc:\n<<: x"
    assert load_yaml(text, what="m") == {
        "a": "no",
        "b": [1, 12, 31, 15, -3, 1000.0, 1.5, 0.5, "1:30", "2024-01-01", "7", True, None, None, ""],
        "c": None,
        "<<": "x",
    }


_PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.text(st.characters(codec="ascii"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc:-", max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(_PLAIN)
def test_yaml_reads_back_json(value: object) -> None:
    # JSON is YAML: the standard library's writer is the oracle
    assert load_yaml(json.dumps(value), what="m") == value


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab:-[]{}&*!|> \n'\"#,?0.~%@`"), max_size=40))
def test_yaml_never_crashes(text: str) -> None:
    try:
        value = load_yaml(text, what="m")
    except ManifestError:
        return
    assert isinstance(value, dict | list | str | int | float | bool | None)


def test_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump({"a": [1, "x"]}))
    assert load_yaml(path, what="m") == {"a": [1, "x"]}
    with pytest.raises(ManifestError) as caught:
        load_yaml(tmp_path / "none.yaml", what="m")
    assert str(caught.value) == f"'{tmp_path / 'none.yaml'}' does not exist."
    with pytest.raises(ManifestError) as caught:
        load_yaml(tmp_path, what="m")
    assert str(caught.value) == f"'{tmp_path}' is a folder; a regular file is needed."


JSON_REFUSED = {
    "duplicates": (
        b'{"a": 1, "a": 2, "b": {"c": 1, "c": 2, "c": 3}}',
        "j: duplicate keys; keep one of each:\n  - key 'c' occurs 3 times\n  - key 'a' occurs 2 times",
    ),
    "NaN": (b'{"a": NaN}', "j: 'NaN' is not a finite number."),
    "overflow": (b"[1e999]", "j: '1e999' is not a finite number."),
    "deep": (b"[" * 40 + b"]" * 40, "j: nested more than 32 levels deep."),
    "very deep": (b"[" * 5000, "j: nested more than 32 levels deep."),
    "large": (b" " * 6000 + b"1", "j: 6,001 bytes; at most 6,000 are allowed."),
    "syntax": (
        b"{",
        "j, line 1, column 2: not valid JSON: Expecting property name enclosed in double quotes.",
    ),
    "surrogate": (rb'["\ud800"]', "j: the text '\\ud800' has half of a surrogate pair."),
    "not UTF-8": (b'"\xff"', "j: not UTF-8 text (byte 1)."),
}


@pytest.mark.parametrize(("data", "message"), JSON_REFUSED.values(), ids=JSON_REFUSED)
def test_json_refused(data: bytes, message: str) -> None:
    with pytest.raises(CardError) as caught:
        load_json(data, what="j", max_bytes=6000, error=CardError)
    assert str(caught.value) == message


class Learned(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    scorer: Literal["learned"]
    rows: int


class Solved(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    scorer: Literal["lda"]
    shrinkage: float = 0.1


class Item(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    ref: str
    weight: float = 1.0


class Recipe(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str
    top_k: Annotated[int, Field(ge=1)] = 2
    experts: tuple[str | Item, ...] = ()
    router: Annotated[Learned | Solved, Field(discriminator="scorer")] | None = None
    extra: dict[str, Item] = {}


def test_validate_accepts() -> None:
    data = {
        "name": "n",
        "experts": ["a", {"ref": "b"}],
        "router": {"scorer": "lda"},
        "extra": {"x": {"ref": "c"}},
    }
    recipe = validate(Recipe, data, what="recipe")
    assert recipe == Recipe(
        name="n", experts=("a", Item(ref="b")), router=Solved(scorer="lda"), extra={"x": Item(ref="c")}
    )


def test_validate_lists_every_mistake() -> None:
    data = {
        "nmae": "n",
        "top_k": 0,
        "experts": ["a", {"ref": "b", "wieght": 1}, 3],
        "router": {"scorer": "lda", "shrinkage": "x", "rows": 1},
        "extra": {"x": {"reff": "c"}},
    }
    with pytest.raises(ManifestError) as caught:
        validate(Recipe, data, what="recipe.yaml")
    assert str(caught.value) == (
        "recipe.yaml has 10 problems:\n"
        "  - name: missing\n"
        "  - top_k: input should be greater than or equal to 1, given 0\n"
        "  - experts.1.wieght: unknown key; did you mean 'weight'? Allowed: ref, weight\n"
        "  - experts.2: input should be a valid string, given 3\n"
        "  - experts.2: input should be an object, given 3\n"
        "  - router.shrinkage: input should be a valid number, given 'x'\n"
        "  - router.rows: unknown key; Allowed: scorer, shrinkage\n"
        "  - extra.x.ref: missing\n"
        "  - extra.x.reff: unknown key; did you mean 'ref'? Allowed: ref, weight\n"
        "  - nmae: unknown key; did you mean 'name'? Allowed: experts, extra, name, router, top_k"
    )
    assert len(caught.value.problems) == 10


def test_validate_one_mistake() -> None:
    with pytest.raises(CardError) as caught:
        validate(Recipe, {"name": "n", "router": {"scorer": "ldaa"}}, what="r", error=CardError)
    assert str(caught.value) == (
        "r has 1 problem:\n"
        "  - router: input tag 'ldaa' found using 'scorer' does not match any of the expected tags: 'learned', 'lda'"
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "r has 1 problem:\n  - input should be an object"),
        (
            {"name": float("nan")},
            "r: not plain data: a number is not finite, or the data contain themselves.",
        ),
        ({"name": {1}}, "r: not plain data: Object of type set is not JSON serializable."),
    ],
)
def test_validate_other_data(data: object, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        validate(Recipe, data, what="r")
    assert str(caught.value) == message


def test_light_imports() -> None:
    code = (
        "import sys, experts, experts.card, experts.base, experts.package, experts.routing_artifacts\n"
        "from experts import ExpertCard, check_expert, pack\n"
        "bad = {'torch', 'transformers', 'peft', 'ray', 'numpy', 'safetensors', 'license_expression', 'yaml'}\n"
        "print(sorted(bad & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_package_names() -> None:
    import experts

    assert experts.__all__ == sorted(experts.__all__)
    for name in experts.__all__:
        assert getattr(experts, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'experts' has no attribute 'nothing'"):
        experts.nothing  # noqa: B018
