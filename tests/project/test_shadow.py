"""Another package that hides one of ours is named, with what to do, before anything breaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipelines.shadow import Shadow, explain, find_shadows


def foreign(folder: Path, name: str) -> Path:
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must never be imported')\n")
    return package


def test_nothing_is_hidden_here(root: Path) -> None:
    assert find_shadows() == find_shadows(root=root) == ()


def test_every_package_is_compared(tmp_path: Path, root: Path) -> None:
    assert [(shadow.name, shadow.found, shadow.expected) for shadow in find_shadows(root=tmp_path)] == [
        (name, root / name, tmp_path / name) for name in ("experts", "registry", "composer", "pipelines")
    ]


def test_a_folder_on_the_path(python: Any, tmp_path: Path, root: Path) -> None:
    package = foreign(tmp_path, "composer")
    result = python("-m", "pipelines.cli", "list", cwd=tmp_path, path=(tmp_path,))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: Another package named 'composer' hides coterie's own: Python finds {package}, coterie's is "
        f"{root}/composer. Rename that folder, take it off PYTHONPATH, or start coterie from another directory.\n"
    )


def test_a_distribution(python: Any, tmp_path: Path, root: Path) -> None:
    package = foreign(tmp_path, "composer")
    info = tmp_path / "mosaicml-0.30.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mosaicml\nVersion: 0.30.0\n")
    (info / "RECORD").write_text("composer/__init__.py,,\nmosaicml-0.30.0.dist-info/METADATA,,\n")
    (info / "top_level.txt").write_text("composer\n")
    result = python("-m", "pipelines.cli", "--help", path=(tmp_path,), cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"Error: Another package named 'composer' hides coterie's own: Python finds {package}, coterie's is "
        f"{root}/composer. It comes from the distribution 'mosaicml'. Install coterie in an environment without it.\n"
    )


def test_a_module_file(python: Any, tmp_path: Path) -> None:
    (tmp_path / "registry.py").write_text("")
    result = python("-m", "pipelines.cli", "list", cwd=tmp_path, path=(tmp_path,))
    assert result.returncode == 1
    assert f"Python finds {tmp_path}/registry.py, " in result.stderr


def test_a_missing_package() -> None:
    shadow = Shadow(name="registry", found=None, expected=Path("/x/registry"))
    assert explain((shadow,)) == (
        "coterie's package 'registry' cannot be imported: it should be in /x/registry. Install coterie again in a "
        "fresh virtual environment."
    )


def test_the_check_costs_less_than_a_millisecond() -> None:
    from time import perf_counter

    def seconds() -> float:
        started = perf_counter()
        find_shadows()
        return perf_counter() - started

    assert min(seconds() for _ in range(20)) < 1e-3
