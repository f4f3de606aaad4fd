"""Rules about the code base itself: exports, names, the direction of imports, packaging."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest


@pytest.mark.parametrize("package", ["experts", "registry", "composer", "pipelines.train"])
def test_exports_exist_and_are_sorted(package: str) -> None:
    module = importlib.import_module(package)
    assert list(module.__all__) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None, name
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing_of_the_kind'"):
        module.nothing_of_the_kind  # noqa: B018


def test_every_module_says_what_it_is_and_exports_only_what_it_defines(modules: dict[str, Path]) -> None:
    problems = []
    for name, path in modules.items():
        tree = ast.parse(path.read_text(), filename=str(path))
        if "migrations.versions" in name:
            continue
        if not ast.get_docstring(tree):
            problems.append(f"{name}: no docstring")
        if path.name != "__init__.py":
            problems += [
                f"{name}: exports {missing}, which it lacks" for missing in _exports(tree) - _defined(tree)
            ]
    assert problems == []


def _exports(tree: ast.Module) -> set[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return set(ast.literal_eval(node.value))
    return set()


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def test_no_module_is_named_like_a_package(root: Path, packages: tuple[str, ...]) -> None:
    """``pipelines/registry.py`` would hide ``registry`` from a script in that folder."""
    folders = [*packages, "benchmarks", "examples"]
    found = [
        path
        for folder in folders
        for path in (root / folder).rglob("*.py")
        if path.stem in packages or (path.parent.name in packages and path.parent.parent != root)
    ]
    assert found == []


def test_no_package_below_tests(root: Path) -> None:
    """``tests/registry/__init__.py`` would make ``registry`` resolve to the tests."""
    assert list((root / "tests").rglob("__init__.py")) == []


def test_every_package_is_typed_and_built(root: Path, packages: tuple[str, ...]) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == list(packages)
    assert [name for name in packages if not (root / name / "py.typed").is_file()] == []


def test_every_dependency_is_pinned(root: Path) -> None:
    """A fresh environment gets the versions that were tested."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {canonicalize_name(line.partition("==")[0]): line.partition("==")[2] for line in lines}
    assert all(pinned.values()), "every line has the form name==version"
    for text in [
        *project["dependencies"],
        *(d for extra in project["optional-dependencies"].values() for d in extra),
    ]:
        requirement = Requirement(text)
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{text} does not allow {version}"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    program = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"],
        cwd=folder,
        env={"PYTHONPATH": str(folder), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_imports_point_to_the_left(root: Path) -> None:
    result = lint_imports(root)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_import_to_the_right_is_caught(root: Path, packages: tuple[str, ...], tmp_path: Path) -> None:
    """The control: the same contracts on a tree in which ``experts`` imports ``composer``."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    for name in packages:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("")
    assert lint_imports(tmp_path).returncode == 0
    (tmp_path / "experts" / "slip.py").write_text("import composer\n")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "experts.slip -> composer" in result.stdout
