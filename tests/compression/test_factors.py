"""The truncated decomposition against numpy's singular values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipelines.compression.factors import factorise
from pipelines.compression.ranks import parse_rank


def matrix(shape: tuple[int, int], *, decay: float = 0.7) -> np.ndarray:
    random = np.random.default_rng(3)
    u, _, v = np.linalg.svd(random.normal(size=shape), full_matrices=False)
    return np.asarray((u * decay ** np.arange(min(shape))) @ v)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
@pytest.mark.parametrize("rank", [1, 4, 11, 12])
def test_the_error_is_the_tail_of_the_singular_values(shape: tuple[int, int], rank: int) -> None:
    m = matrix(shape)
    u, s, v = np.linalg.svd(m, full_matrices=False)
    factors = factorise(torch.from_numpy(m), parse_rank(str(rank)))
    assert factors.a.shape == (rank, shape[1])
    assert factors.b.shape == (shape[0], rank)
    product = (factors.b @ factors.a).numpy()
    np.testing.assert_allclose(product, (u[:, :rank] * s[:rank]) @ v[:rank], atol=1e-12)
    np.testing.assert_allclose(
        np.linalg.norm(m - product), np.sqrt((s[rank:] ** 2).sum()), rtol=1e-7, atol=1e-13
    )
    np.testing.assert_allclose(factors.squared, s**2, atol=1e-14)


def test_the_factors_are_balanced() -> None:
    m = matrix((20, 12))
    factors = factorise(torch.from_numpy(m), parse_rank("5"))
    s = np.linalg.svd(m, compute_uv=False)[:5]
    np.testing.assert_allclose((factors.a @ factors.a.T).numpy(), np.diag(s), atol=1e-12)
    np.testing.assert_allclose((factors.b.T @ factors.b).numpy(), np.diag(s), atol=1e-12)


def test_a_spectrum_that_falls_far() -> None:
    """Singular values below sqrt(eps) of the largest are lost in M M^T, not in the product."""
    m = matrix((20, 12), decay=1e-2)
    factors = factorise(torch.from_numpy(m), parse_rank("12"))
    assert np.linalg.norm((factors.b @ factors.a).numpy() - m) < 1e-14


def test_zero() -> None:
    factors = factorise(torch.zeros(8, 5), parse_rank("auto"))
    assert factors.rank == 1
    assert not factors.a.any()
    assert not factors.b.any()
