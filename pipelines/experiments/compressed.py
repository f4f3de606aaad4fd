"""Every owner's full expert, made low-rank after training: the arm with a third of the experts' bytes.

Knows how a compressed expert is registered; the decomposition is in ``pipelines.compression``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from pipelines.compression import CompressionError
from pipelines.experiments.world import World

__all__ = ["BYTE_SHARE", "compressed_experts"]

BYTE_SHARE = 1 / 3
"""Of a full expert's bytes, at most this much."""


def compressed_experts(world: World, names: Mapping[str, str], *, rank: int) -> dict[str, str]:
    """Compress experts to a rank and register them; what is registered already is kept.

    Args:
        world: The seed's world.
        names: References of full experts, by domain.
        rank: Of every matrix.

    Returns:
        Reference by domain.

    Raises:
        CompressionError: The rank takes more than `BYTE_SHARE` of the full expert's bytes, or an expert is not full.
    """
    known = {record.name for record in world.registry.experts()}
    compressed = {}
    for domain, reference in names.items():
        name = f"{world.owner(domain)}/rank-{rank}"
        compressed[domain] = name
        if name not in known:
            _compress(world, reference, name, rank=rank)
    return compressed


def _compress(world: World, reference: str, name: str, *, rank: int) -> None:
    from pipelines.compression.run import compress_expert

    out = world.folder / "compressed" / name
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    report = compress_expert(reference, rank=str(rank), registry=world.registry, out=out, name=name).report
    share = report.bytes_after / report.bytes_before
    if share > BYTE_SHARE:
        fitting = max(1, int(rank * BYTE_SHARE / share))
        raise CompressionError(
            f"rank {rank} takes {share:.0%} of the bytes of {reference}; the low-rank arm may take a third. Set a rank "
            f"of at most {fitting}."
        )
    world.tell(f"{name}: {share:.0%} of the bytes, relative error {report.relative_error:.3f}")
    world.registry.register(out)
