import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from experts.errors import AssetError, UnknownNameError
from pipelines.assets import ASSETS, asset_files, cache_folder, fetch


def test_takes_the_named_files_out_and_nothing_else(fake_asset, tmp_path):
    _, download = fake_asset()
    files = asset_files("fake", cache=tmp_path / "cache", download=download)
    assert [path.name for path in files] == ["one.txt", "two.txt"]
    assert [path.read_bytes() for path in files] == [b"first\n", b"second\n"]


def test_downloads_once(fake_asset, tmp_path):
    _, download = fake_asset()
    told = []
    first = asset_files("fake", cache=tmp_path, download=download, progress=told.append)
    again = asset_files("fake", cache=tmp_path, download=download, progress=told.append)
    assert first == again
    assert download.calls == ["pack==1.0"]
    assert told == ["Downloading pack==1.0 (0 MB)"]


def test_side_by_side_downloads_once(fake_asset, tmp_path):
    _, download = fake_asset()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: asset_files("fake", cache=tmp_path, download=download), range(8)))
    assert len(set(results)) == 1
    assert download.calls == ["pack==1.0"]


def test_a_file_placed_by_hand_needs_no_network(fake_asset, tmp_path):
    asset, download = fake_asset()
    placed = tmp_path / "cache" / "downloads"
    placed.mkdir(parents=True)
    (placed / asset.archive).write_bytes((tmp_path / "made" / asset.archive).read_bytes())
    assert len(asset_files("fake", cache=tmp_path / "cache", download=download)) == 2
    assert download.calls == []


def test_refuses_another_digest_and_leaves_nothing(fake_asset, tmp_path):
    asset, download = fake_asset(sha256="0" * 64)
    digest = fetch.hashlib.sha256((tmp_path / "made" / asset.archive).read_bytes()).hexdigest()
    with pytest.raises(AssetError) as caught:
        asset_files("fake", cache=tmp_path / "cache", download=download)
    assert str(caught.value) == (
        f"pack-1.0-py3-none-any.whl has sha256 {digest}, and the asset 'fake' is pinned to {'0' * 64}. Somebody "
        "changed the file on its way; nothing was taken out of it."
    )
    assert [path.name for path in (tmp_path / "cache" / "assets").iterdir()] == ["fake.lock"]


def test_says_what_is_missing_in_the_wheel(fake_asset, tmp_path):
    _, download = fake_asset(members="pack/data/*.xml")
    with pytest.raises(AssetError) as caught:
        asset_files("fake", cache=tmp_path, download=download)
    assert str(caught.value) == (
        "pack-1.0-py3-none-any.whl holds no file 'pack/data/*.xml', which the asset 'fake' is made of."
    )


def test_a_member_cannot_leave_the_folder(fake_asset, tmp_path):
    _, download = fake_asset({"../../evil.txt": b"out"}, members="*.txt")
    (taken,) = asset_files("fake", cache=tmp_path / "cache", download=download)
    assert taken.parent.parent == tmp_path / "cache" / "assets"
    assert not list(tmp_path.parent.glob("evil.txt"))
    assert not (tmp_path / "evil.txt").exists()


def test_below_a_root_the_files_keep_their_paths(fake_asset, tmp_path):
    made = {
        "pack/model/config.json": b"{}",
        "pack/model/1_Pooling/config.json": b"[]",
        "pack/other.json": b"",
    }
    _, download = fake_asset(made, members="pack/model/*", root="pack/model")
    files = asset_files("fake", cache=tmp_path / "cache", download=download)
    folder = files[-1].parent
    assert {path.relative_to(folder).as_posix(): path.read_bytes() for path in files} == {
        "1_Pooling/config.json": b"[]",
        "config.json": b"{}",
    }


def test_below_a_root_a_member_cannot_leave_the_folder(fake_asset, tmp_path):
    _, download = fake_asset(
        {"pack/model/../../../evil.txt": b"out"}, members="pack/model/*", root="pack/model"
    )
    with pytest.raises(AssetError) as caught:
        asset_files("fake", cache=tmp_path / "cache", download=download)
    assert str(caught.value) == (
        "pack-1.0-py3-none-any.whl holds the file 'pack/model/../../../evil.txt', whose path leaves its folder."
    )


def test_unknown_asset_names_the_nearest():
    with pytest.raises(UnknownNameError) as caught:
        asset_files("smolm2")
    assert str(caught.value) == (
        "Unknown asset 'smolm2'. Did you mean 'smollm2'? "
        "Known: bbc-news, gutenberg, icd10cm, minilm, smollm2, spdx-licenses."
    )


def test_unreachable_registry_says_what_to_do(fake_asset, tmp_path, monkeypatch):
    """The real client against an index that is not there."""
    fake_asset()
    for name, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_NO_INDEX": "0",
        "PIP_FIND_LINKS": "",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_CONFIG_FILE": "/dev/null",
        "NO_PROXY": "*",
    }.items():
        monkeypatch.setenv(name, value)
    quick = [("0" if part == "2" else part) for part in fetch._PIP]
    monkeypatch.setattr(fetch, "_PIP", tuple(quick))
    with pytest.raises(AssetError) as caught:
        asset_files("fake", cache=tmp_path / "cache")
    assert str(caught.value) == (
        "The asset 'fake' (pack==1.0 on PyPI) could not be downloaded: pip says: ERROR: No matching distribution "
        "found for pack==1.0. Check the network and pip's index settings, or put pack-1.0-py3-none-any.whl into "
        f"{tmp_path / 'cache' / 'downloads'} by hand."
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (subprocess.CompletedProcess([], 1, "", "No module named pip\n"), "pip says: No module named pip"),
        (subprocess.CompletedProcess([], 3, "", ""), "pip says: exit code 3"),
        (subprocess.CompletedProcess([], 0, "", ""), "it did not bring pack-1.0-py3-none-any.whl"),
        (subprocess.TimeoutExpired([], 1800), "pip took longer than 1800 s"),
    ],
    ids=["no-pip", "silent", "other-file", "too-slow"],
)
def test_every_failure_of_the_client_is_told(fake_asset, tmp_path, monkeypatch, outcome, said):
    fake_asset()

    def run(command, **settings):
        assert command[0] == sys.executable
        assert "pack==1.0" in command
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(AssetError) as caught:
        asset_files("fake", cache=tmp_path / "cache")
    assert str(caught.value) == (
        f"The asset 'fake' (pack==1.0 on PyPI) could not be downloaded: {said}. Check the network and pip's index "
        f"settings, or put pack-1.0-py3-none-any.whl into {tmp_path / 'cache' / 'downloads'} by hand."
    )


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COTERIE_CACHE", raising=False)
    assert cache_folder().name == "coterie"
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


@pytest.mark.parametrize("asset", ASSETS.values(), ids=lambda asset: asset.name)
def test_the_table_is_whole(asset):
    assert re.fullmatch(r"[0-9a-f]{64}", asset.sha256)
    assert re.fullmatch(r"\d+(\.\d+)+", asset.version)
    assert asset.archive.startswith(asset.package.replace("-", "_") + f"-{asset.version}-")
    assert asset.archive.endswith("-none-any.whl")
    assert asset.size > 1_000_000
    assert asset.license
    assert asset.notes.endswith(".")
