"""Noisy statistics: the mechanism's own definition, what one document can change, and jobs and routers with them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from experts.errors import DataError, ManifestError
from experts.package import read_package
from experts.routing_artifacts import RoutingArtifacts, RoutingInfo, Statistics
from pipelines.train.noise import Contributions, NoiseBudget, noise_multiplier, project_covariance, release

WIDTH = 6
PUBLIC = Statistics.from_states(
    (lambda x: x / np.sqrt((x**2).mean(axis=1, keepdims=True)))(
        np.random.default_rng(0).normal(0.5, 1, size=(400, WIDTH))
    )
)


def _document(seed: int, *, tokens: int = 12, loc: float = 0.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(loc, 1, size=(tokens, WIDTH))).float()


def _contributions(documents, **budget) -> Contributions:
    settings = {"epsilon": 1.0, "delta": 1e-4, "release": "mean", "clip": 0.5, **budget}
    given = Contributions(public=PUBLIC, budget=NoiseBudget(**settings), normalization="rms")
    for document in documents:
        given.add(document)
    return given


@pytest.mark.parametrize(("epsilon", "delta"), [(0.1, 1e-3), (1.0, 1e-5), (8.0, 1e-6), (40.0, 1e-9)])
def test_the_multiplier_is_the_smallest_that_the_definition_allows(epsilon, delta):
    """delta is the largest ``P(S) - e^epsilon Q(S)``: the integral of ``max(0, p - e^epsilon q)``."""
    sigma = noise_multiplier(epsilon=epsilon, delta=delta)

    def leaked(s):
        edge = 0.5 - epsilon * s**2  # where p = e^epsilon q, for means 0 and 1
        density = lambda x: norm.pdf(x, 0, s) - np.exp(epsilon) * norm.pdf(x, 1, s)  # noqa: E731
        return quad(density, edge - 12 * s, edge, epsabs=1e-14, epsrel=1e-10, limit=400)[0]

    assert leaked(sigma) == pytest.approx(delta, rel=1e-3)
    assert leaked(sigma * 0.99) > delta
    # never more than the classical bound, which holds for epsilon below 1 (Dwork, Roth 2014, theorem A.1)
    if epsilon < 1:
        assert sigma <= np.sqrt(2 * np.log(1.25 / delta)) / epsilon


@pytest.mark.parametrize("kind", ["mean", "moments"])
def test_one_document_moves_the_sums_by_no_more_than_the_bound(kind):
    """However long or far off it is; so replacing one moves their average by at most 2 bound / N."""
    rest = [_document(seed) for seed in range(5)]
    without = _contributions(rest, release=kind)
    for odd in (_document(9, tokens=1), _document(9, tokens=500, loc=30.0), _document(9) * 1e4):
        with_it = _contributions([*rest, odd], release=kind)
        assert np.linalg.norm(with_it.mean - without.mean) <= with_it.clip_norm * (1 + 1e-9)
        if kind == "moments":
            moved = np.linalg.norm(with_it.second - without.second)
            assert moved <= with_it.second_clip_norm * (1 + 1e-9)
    # a control: the exact sums move by far more
    exact = [Statistics.from_states(d.numpy()) for d in (_document(9), _document(9) * 1e4)]
    assert np.linalg.norm(exact[1].sum) > 1000 * without.clip_norm


def test_an_empty_document_counts_and_contributes_nothing():
    full, one_more = _contributions([_document(1)]), _contributions([_document(1), torch.empty(0, 0)])
    assert (full.documents, one_more.documents) == (1, 2)
    assert np.array_equal(full.mean, one_more.mean)


@pytest.mark.parametrize("kind", ["mean", "moments"])
def test_the_noise_has_the_stated_size(kind):
    given = _contributions([_document(seed) for seed in range(50)], release=kind, epsilon=0.5)
    clean = PUBLIC.mean + given.mean / 50
    draws = [release(given, secret=bytes([n])) for n in range(200)]
    info = draws[0][1]
    errors = np.array([statistics.mean - clean for statistics, _ in draws])
    assert errors.std() == pytest.approx(info.noise_std, rel=0.1)
    queries = {"mean": 1, "moments": 2}[kind]
    sensitivity = 2 * given.clip_norm / 50
    assert info.noise_std == pytest.approx(
        noise_multiplier(epsilon=0.5, delta=1e-4) * sensitivity * queries**0.5
    )
    assert (info.epsilon, info.delta, info.unit, info.release) == (0.5, 1e-4, "document", kind)


def test_the_same_data_get_the_same_noise_and_others_get_their_own():
    given = _contributions([_document(1), _document(2)])
    again = _contributions([_document(1), _document(2)])
    other = _contributions([_document(1), _document(3)])
    (a, _), (b, _), (c, _) = (release(g, secret=b"k") for g in (given, again, other))
    assert np.array_equal(a.sum, b.sum)
    noises = [s.mean - PUBLIC.mean - g.mean / 2 for s, g in ((a, given), (c, other))]
    assert np.abs(noises[0] - noises[1]).max() > 0.1 * np.abs(noises[0]).max()
    assert not np.array_equal(release(given, secret=b"l")[0].sum, a.sum)


@pytest.mark.parametrize("kind", ["mean", "moments"])
@pytest.mark.parametrize("epsilon", [0.05, 50.0])
def test_what_is_published_is_admitted_however_strong_the_noise(tmp_path, kind, epsilon):
    from experts.routing_artifacts import StatisticsInfo
    from pipelines.train.routing import statistics_tensors

    given = _contributions([_document(seed) for seed in range(20)], release=kind, epsilon=epsilon)
    statistics, noise = release(given, secret=b"k")
    assert np.linalg.eigvalsh(statistics.covariance).min() > -1e-9
    # states of unit root mean square have a squared length of their width
    assert np.trace(statistics.scatter) == pytest.approx(20 * np.trace(PUBLIC.scatter) / PUBLIC.count)
    info = RoutingInfo(
        statistics=StatisticsInfo(layer=1, normalization="rms", tokens=20, documents=20, noise=noise)
    )
    RoutingArtifacts(info=info, tensors=statistics_tensors(statistics)).save(tmp_path)
    assert RoutingArtifacts.load(tmp_path, info).statistics is not None
    assert RoutingInfo.model_validate_json(info.model_dump_json()) == info


def test_with_next_to_no_noise_it_is_the_documents_average():
    documents = [_document(seed, loc=0.3) for seed in range(400)]
    given = _contributions(documents, release="moments", epsilon=50.0, delta=1e-4, clip=2.0)
    statistics, _ = release(given, secret=b"k")
    x = np.stack([d.double().numpy() for d in documents])
    x /= np.sqrt((x**2).mean(axis=2, keepdims=True))
    pooled = Statistics.from_states(x.reshape(-1, WIDTH))
    np.testing.assert_allclose(statistics.mean, pooled.mean, atol=0.01)
    np.testing.assert_allclose(statistics.covariance, pooled.covariance, atol=0.05)


def test_the_projection_is_the_nearest_possible_matrix():
    """Against random possible matrices, and against alternating projections."""
    random = np.random.default_rng(0)
    noisy = random.normal(size=(5, 5))
    noisy = noisy + noisy.T
    found = project_covariance(noisy, trace=3.0)
    assert np.linalg.eigvalsh(found).min() > -1e-12
    assert np.trace(found) == pytest.approx(3.0)
    best = np.linalg.norm(found - noisy)
    for _ in range(200):
        root = random.normal(size=(5, 5))
        near = found + 0.05 * root @ root.T
        near *= 3.0 / np.trace(near)
        assert np.linalg.norm(near - noisy) >= best - 1e-12
    possible = np.diag([1.0, 0.5, 0.5, 1.0, 0.0])
    np.testing.assert_allclose(project_covariance(possible, trace=3.0), possible, atol=1e-12)


def test_a_delta_that_would_allow_publishing_a_document():
    with pytest.raises(DataError) as caught:
        release(_contributions([_document(n) for n in range(4)], delta=0.5), secret=b"")
    assert str(caught.value) == (
        "statistics.noise: a delta of 0.5 for 4 documents; it must be below 1 / documents (0.25), or publishing one "
        "of them would be allowed. Give a smaller delta."
    )


# ---------------------------------------------------------------- whole jobs


@pytest.fixture(scope="module")
def public(anchor, texts, tmp_path_factory):
    """The pico anchor with public statistics of layer 2."""
    from pipelines.train.anchor import resolve_base
    from pipelines.train.routing import public_routing
    from pipelines.train.windows import read_documents

    folder = tmp_path_factory.mktemp("noise") / "public"
    with resolve_base(str(anchor())) as base:
        public_routing(
            base, read_documents([texts["public"]]), out=folder, layer=2, sequence_length=32, windows=40
        )
        info = RoutingInfo.model_validate_json((folder / "routing.json").read_bytes())
        yield replace(base, routing_file=folder / info.file, routing_info=info)


def _published(out):
    info = read_package(out).routing
    return info.statistics, RoutingArtifacts.load(out, info, hidden_size=32).statistics


def test_a_job_with_noise(make_job, public, tmp_path):
    from pipelines.train.worker import train_job

    noise = {"epsilon": 2.0, "delta": 1e-3}
    job = make_job(steps=20, statistics={"noise": noise})
    out = train_job(job, out=tmp_path / "out", base=public, threads=1)
    info, statistics = _published(out)
    documents = 39  # of forty, with one held out
    assert (info.documents, info.tokens, statistics.count) == (documents, documents, documents)
    assert (info.noise.epsilon, info.noise.delta, info.noise.release) == (2.0, 1e-3, "mean")
    card = json.loads((out / "card.json").read_text())
    assert card["training"]["settings"]["statistics_epsilon"] == 2.0
    assert card["training"]["privacy"] is None  # the guarantee is not one for the weights
    # the secret is the owner's: kept for the next run of the same job, readable by nobody else, in no file
    key = job.directory / "noise.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_bytes()) == 32
    assert all(key.read_bytes() not in path.read_bytes() for path in out.iterdir())
    again = train_job(job, out=tmp_path / "again", base=public, threads=1)
    assert (again / "routing.safetensors").read_bytes() == (out / "routing.safetensors").read_bytes()
    strict = make_job(steps=20, statistics={"noise": {**noise, "epsilon": 0.5, "seed": 1}})
    other = train_job(strict, out=tmp_path / "other", base=public, threads=1)
    assert _published(other)[0].noise.noise_std > 2 * info.noise.noise_std
    assert "seed" not in json.loads((other / "card.json").read_text())["routing"]["statistics"]["noise"]


@pytest.mark.parametrize("kind", ["mean", "moments"])
def test_routers_solved_from_noisy_statistics_find_the_owner(make_job, public, texts, tmp_path, kind):
    """Thirty-two documents and a mild budget: most held-out text goes where it belongs, as with exact sums."""
    from composer.routing.scorers.lda import solve_lda
    from composer.routing.scorers.ridge import solve_ridge
    from pipelines.train.anchor import load_anchor
    from pipelines.train.corpus import read_corpus
    from pipelines.train.noisy_statistics import noisy_statistics
    from pipelines.train.states import SplitDecoder

    budgets = {"mild": 40.0, "hopeless": 0.01}
    classes = {name: [public.routing().statistics] for name in budgets}
    states = []
    model, tokenizer = load_anchor(public, dtype="float32")
    split = SplitDecoder(model, layers_prefix="model.layers", first=2)
    for owner in ("law", "code"):
        for name, epsilon in budgets.items():
            noise = {"epsilon": epsilon, "delta": 1e-2, "release": kind, "seed": 0}
            job = make_job(data=str(texts[owner]), steps=40, statistics={"noise": noise}, held_out=0.2)
            corpus = read_corpus(job, tokenizer)
            own, _ = noisy_statistics(job, base=public, split=split, documents=corpus.single)
            classes[name].append(own)
        x = split.lower(torch.from_numpy(corpus.held_out.ids).long()).double()
        states.append((x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).mean(dim=1).numpy())
    for solve in (solve_lda, solve_ridge):
        accuracy = {}
        for name in budgets:
            weights, biases = solve(classes[name])
            right = [(x @ weights.T + biases).argmax(axis=1) == n for n, x in enumerate(states, start=1)]
            accuracy[name] = np.concatenate(right).mean()
        assert accuracy["mild"] > 0.7, solve.__name__
        assert accuracy["hopeless"] < accuracy["mild"] - 0.1, solve.__name__


def test_a_composition_of_experts_with_noisy_statistics(make_job, public, texts, tmp_path):
    """It is built, runs and lets an owner leave as any other does."""
    from composer import Manifest, build, load, plan
    from pipelines.train.worker import train_job
    from registry import Registry

    registry = Registry(tmp_path / "registry")
    registry.add_base(public.folder, name="pico")
    registry.set_base_routing("pico", public.routing_file.parent, public.routing_info)
    noise = {"epsilon": 1.0, "delta": 1e-3}
    for owner in ("law", "code"):
        job = make_job(
            name=f"{owner}/x", base="pico", data=str(texts[owner]), steps=2, statistics={"noise": noise}
        )
        registry.register(train_job(job, out=tmp_path / owner, registry=registry, threads=1))

    def compose(name, *experts):
        manifest = Manifest.from_dict({"name": name, "base": "pico", "experts": list(experts)})
        return load(build(plan(manifest, registry), tmp_path / name, registry=registry))

    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    both, never = compose("both", "law/x", "code/x"), compose("never", "law/x")
    with torch.no_grad():
        assert torch.isfinite(both(ids).logits).all()
        assert torch.equal(both(ids, opt_out=["code"]).logits, never(ids).logits)


def test_noise_without_public_statistics(make_job, anchor, public, tmp_path):
    from pipelines.train.worker import train_job

    job = make_job(statistics={"noise": {"epsilon": 1.0}})
    with pytest.raises(ManifestError) as caught:
        train_job(job, out=tmp_path / "out", threads=1)
    start = (
        "statistics.noise needs the base's public statistics of layer {} with normalization 'rms', which documents "
        "are measured from; the base "
    )
    assert str(caught.value) == (start.format(2) + "publishes none. Attach them: coterie base public-routing")
    job = make_job(layers=[1], statistics={"noise": {"epsilon": 1.0}})
    with pytest.raises(ManifestError) as caught:
        train_job(job, out=tmp_path / "out", base=public, threads=1)
    assert str(caught.value) == (
        start.format(1)
        + "publishes those of layer 2 with normalization 'rms'. Attach them: coterie base public-routing"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ({}, "statistics.noise.epsilon: missing"),
        ({"epsilon": 0.0}, "statistics.noise.epsilon: input should be greater than 0, given 0.0"),
        ({"epsilon": 1.0, "delta": 1.0}, "statistics.noise.delta: input should be less than 1, given 1.0"),
        (
            {"epsilon": 1.0, "release": "all"},
            "statistics.noise.release: input should be 'mean' or 'moments', given 'all'",
        ),
    ],
)
def test_settings_out_of_range(make_job, noise, message):
    with pytest.raises(ManifestError) as caught:
        make_job(statistics={"noise": noise})
    assert caught.value.problems == (message,)
