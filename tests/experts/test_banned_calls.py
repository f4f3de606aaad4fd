"""No package may unpickle, evaluate or import what a file says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("experts", "registry", "composer", "pipelines")
MODULES = frozenset({"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"})
CALLS = frozenset(
    {
        "torch.load",
        "yaml.load",
        "yaml.load_all",
        "yaml.full_load",
        "yaml.full_load_all",
        "yaml.unsafe_load",
        "yaml.unsafe_load_all",
        "pandas.read_pickle",
        "numpy.fromregex",
    }
)
BUILTINS = frozenset({"eval", "exec", "compile", "__import__"})
FLAGS = frozenset({"trust_remote_code", "allow_pickle"})


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Local name to the dotted name it stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                names[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([names.get(node.id, node.id), *reversed(parts)])


def banned(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for module in modules:
                if MODULES & set(module.split(".")):
                    yield node.lineno, f"import {module}"
        if isinstance(node, ast.Call):
            name = dotted(node.func, names)
            if name in CALLS or name in BUILTINS or MODULES & set(name.split(".")[:-1]):
                yield node.lineno, name
            for keyword in node.keywords:
                allowed = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in FLAGS and not allowed:
                    yield node.lineno, f"{keyword.arg}={ast.unparse(keyword.value)}"
                if keyword.arg == "weights_only" and name.endswith("load"):
                    yield node.lineno, name


CAUGHT = {
    "import pickle": "import pickle",
    "from cloudpickle import loads": "import cloudpickle",
    "import ray.cloudpickle as rc\nrc.loads(b'')": "import ray.cloudpickle",
    "import torch\ntorch.load('x')": "torch.load",
    "import torch as t\nt.load('x')": "torch.load",
    "from torch import load\nload('x')": "torch.load",
    "import yaml\nyaml.load('x', Loader=L)": "yaml.load",
    "from yaml import unsafe_load as f\nf('x')": "yaml.unsafe_load",
    "import joblib\njoblib.load('x')": "import joblib",
    "import shelve": "import shelve",
    "import numpy as np\nnp.load('x', allow_pickle=True)": "allow_pickle=True",
    "import numpy as np\nnp.load('x', allow_pickle=flag)": "allow_pickle=flag",
    "M.from_pretrained('x', trust_remote_code=True)": "trust_remote_code=True",
    "M.from_pretrained('x', trust_remote_code=1)": "trust_remote_code=1",
    "eval('1')": "eval",
    "exec('1')": "exec",
    "compile('1', '', 'eval')": "compile",
}
HARMLESS = [
    "model.eval()",
    "import re\nre.compile('x')",
    "import yaml\nyaml.safe_load('x')",
    "import numpy as np\nnp.load('x', allow_pickle=False)",
    "M.from_pretrained('x', trust_remote_code=False)",
    "'import pickle'  # in a text",
    "import json\njson.load(f)",
]


@pytest.mark.parametrize(("source", "expected"), CAUGHT.items())
def test_the_scan_catches(source: str, expected: str) -> None:
    assert expected in [what for _, what in banned(source)]


@pytest.mark.parametrize("source", HARMLESS)
def test_the_scan_lets_pass(source: str) -> None:
    assert list(banned(source)) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_banned_call(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"no source found in {package}"
    hits = [
        f"{path.relative_to(ROOT)}:{line}: {what}"
        for path in files
        for line, what in banned(path.read_text("utf-8"))
    ]
    assert hits == []
