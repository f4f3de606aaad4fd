"""Cost of routing queries among experts, against the same base without any.

The base has the size of MiniLM (six layers of 384) and random weights; eight experts adapt query and value in the upper
three layers. Runs take turns; a cost is the routed time over the base's, so 1 means that routing is free.

``query_cost`` encodes texts in batches of 32, routed in one pass on the state that enters layer 3; the other ways a
router may be set up stand beside it. ``mixed_cost`` is the forward pass alone, every row with an expert of its own.
``thread_errors`` counts rows that differ from what one thread computes. ``route_100k_ms`` routes one query among
100,000 experts. ``index_docs_per_second`` encodes documents of about 60 tokens into an index on disk, and
``index_vectors_per_second`` writes vectors that are there already.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from _common import Aim, Report, Sample, arguments, ratio, times, working_folder

AIMS = (
    Aim(figure="query_cost", bound=1.25),
    Aim(figure="mixed_cost", bound=1.1),
    Aim(figure="thread_errors", bound=0),
    Aim(figure="route_100k_ms", bound=15),
)
OWNERS = tuple(f"owner-{number}" for number in range(1, 9))
BATCH = 32
WORDS = 12
WAYS: dict[str, dict[str, Any]] = {
    "query_cost": {"selector": "top1", "route_on": "layer_state"},
    "query_cost_two_pass": {"selector": "top1"},
    "query_cost_top2": {"selector": "top2", "route_on": "layer_state"},
    "query_cost_soft": {"selector": "soft"},
    "query_cost_soft_all_layers": {"selector": "soft", "share_lower_layers": False},
    "query_cost_soft_one_pass": {"selector": "soft", "route_on": "layer_state"},
}
SYLLABLES = tuple(c + v for c in "bcdfghjklmnprstvwxz" for v in "aeiou")


def texts(count: int, *, seed: int = 0) -> list[str]:
    """Draw texts of nonsense words."""
    draw = random.Random(seed)
    return [" ".join("".join(draw.choices(SYLLABLES, k=2)) for _ in range(WORDS)) for _ in range(count)]


def make_base(folder: Path, *, tiny: bool) -> Path:
    """Write an embedding model with random weights."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SYLLABLES, *(f"##{s}" for s in SYLLABLES)]
    size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    if not tiny:
        size = {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        }
    torch.manual_seed(0)
    plain = folder / "plain"
    plain.mkdir(parents=True)
    vocabulary = {word: number for number, word in enumerate(words)}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=128, **size)).save_pretrained(plain)
    tokenizer = BertWordPieceTokenizer(vocabulary)
    BertTokenizerFast(tokenizer_object=tokenizer._tokenizer, model_max_length=64).save_pretrained(plain)
    first = Transformer(str(plain), max_seq_length=64)
    model = SentenceTransformer(modules=[first, Pooling(size["hidden_size"]), Normalize()], device="cpu")
    model.similarity_fn_name = "cosine"
    model.save_pretrained(str(folder / "base"))
    return folder / "base"


def register(registry: Any, owner: str, base: Any, work: Path, *, seed: int) -> None:
    """Publish a retriever with random factors, and sums over random queries."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertConfig, BertModel

    from experts.package import pack
    from experts.retrieval_artifacts import Moments, RetrievalArtifacts
    from experts.routing_artifacts import RoutingArtifacts, RoutingInfo

    description = base.description
    upper = list(range(description.num_layers // 2, description.num_layers))
    config = LoraConfig(
        r=8,
        lora_alpha=32,
        target_modules=["query", "value"],
        layers_to_transform=upper,
        layers_pattern="layer",
        task_type="FEATURE_EXTRACTION",
    )
    raw = work / f"raw-{owner}"
    adapted = get_peft_model(BertModel(BertConfig(**dict(description.config))), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapted.peft_config["default"].base_model_name_or_path = "bench"
    adapted.save_pretrained(raw)
    generator, width = np.random.default_rng(seed), description.hidden_size
    vectors = generator.normal(size=(2 * width, width)) * 0.1 + generator.normal(size=width) * 0.3
    moments = Moments.from_vectors(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    sums = RetrievalArtifacts.create(
        embedding=moments, normalization="l2", state=moments, state_layer=upper[0]
    )
    info = RoutingInfo(retrieval=sums.info)
    RoutingArtifacts(info=info, tensors=sums.tensors()).save(raw)
    packed = work / f"packed-{owner}"
    pack(
        raw,
        packed,
        name=f"{owner}/search",
        version=1,
        domain="nonsense",
        license="CC0-1.0",
        base=description,
        base_ref=base.ref,
        routing=info,
    )
    registry.register(packed)


def prepare(work: Path, *, tiny: bool) -> None:
    """Make the base, the experts, and a composed folder for each way to route."""
    from composer.building import build
    from composer.manifest import Manifest
    from composer.planning import plan
    from registry import Registry

    registry = Registry(work / "registry")
    registry.add_base(make_base(work / "model", tiny=tiny), name="bench")
    for seed, owner in enumerate(OWNERS):
        register(registry, owner, registry.base("bench"), work, seed=seed)
    for name, router in WAYS.items():
        manifest = Manifest.from_dict(
            {
                "name": name,
                "recipe": "router_retriever",
                "base": "bench",
                "experts": [f"{owner}/search" for owner in OWNERS],
                "router": router,
            }
        )
        build(plan(manifest, registry), work / name, registry=registry)


def timed(job: Callable[[], Any]) -> Sample:
    """Measure one call."""
    cpu, wall = time.process_time(), time.perf_counter()
    job()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    return Sample(seconds=seconds, cpu_seconds=cpu_seconds, growth_mb=0.0, peak_mb=0.0)


def turns(report: Report, arms: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, list[Sample]]:
    """Let arms take turns after a warm-up, each round the other way around."""
    found: dict[str, list[Sample]] = {arm: [] for arm in arms}
    names = list(arms)
    for turn in range(rounds + 1):
        names.reverse()
        for arm in names:
            sample = timed(arms[arm])
            if turn:
                found[arm].append(report.run(arm, sample))
    return found


def query_costs(report: Report, work: Path, *, rounds: int, clock: str, batches: int) -> None:
    """Encode the same texts with the base and every way to route."""
    from sentence_transformers import SentenceTransformer

    from composer.loading import load

    queries = texts(BATCH * batches)
    base = SentenceTransformer(str(work / "model" / "base"), device="cpu", local_files_only=True)
    models = {name: load(work / name) for name in WAYS}
    arms = {name: partial(model.encode_query, queries, batch_size=BATCH) for name, model in models.items()}
    everyone = {"base": partial(base.encode_query, queries, batch_size=BATCH), **arms}
    seconds = turns(report, everyone, rounds=rounds)
    for name in WAYS:
        report.figure(name, ratio(times(seconds[name], clock), times(seconds["base"], clock)))


def mixed_cost(report: Report, work: Path, *, rounds: int, clock: str, batches: int) -> None:
    """Run the encoder with an expert for each row, and the base."""
    import torch
    from transformers import AutoModel

    from composer.loading import load
    from composer.retrieval.request import EncodingPass, Slots, encoding_pass

    model = load(work / "query_cost")
    base = AutoModel.from_pretrained(work / "model" / "base", local_files_only=True).eval()
    features = model[0].preprocess(texts(BATCH, seed=1))
    inputs = {name: features[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    slots = Slots.of([1 + row % len(OWNERS) for row in range(BATCH)], torch.device("cpu"))

    def mixed() -> None:
        for _ in range(batches):
            with encoding_pass(EncodingPass(slots=slots)):
                model[0].model.run_base(inputs)

    def plain() -> None:
        for _ in range(batches):
            base(**inputs)

    with torch.inference_mode():
        seconds = turns(report, {"base-forward": plain, "mixed-forward": mixed}, rounds=rounds)
    taken = [times(seconds[arm], clock) for arm in ("mixed-forward", "base-forward")]
    report.figure("mixed_cost", ratio(*taken))


def thread_errors(report: Report, work: Path, *, calls: int, threads: int = 8) -> None:
    """Encode from many threads, each call with another set of owners left out, and count wrong rows."""
    import torch

    from composer.loading import load

    model = load(work / "query_cost")
    before = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # the threads are the benchmark's; a call's bits must not depend on how many it has
    draw = random.Random(2)
    cases = [
        (text, frozenset(draw.sample(OWNERS, k=draw.randrange(len(OWNERS))))) for text in texts(64, seed=3)
    ]
    expected = [model.encode_query([text], opt_out=owners) for text, owners in cases]

    def work_on(thread: int) -> int:
        chosen = random.Random(thread)
        wrong = 0
        for _ in range(calls // threads):
            case = chosen.randrange(len(cases))
            text, owners = cases[case]
            wrong += not np.array_equal(model.encode_query([text], opt_out=owners), expected[case])
        return wrong

    with ThreadPoolExecutor(threads) as pool:
        found: list[int] = []
        sample = timed(lambda: found.extend(pool.map(work_on, range(threads))))
    torch.set_num_threads(before)
    report.run("threads", sample, calls=calls, distinct=len({e.tobytes() for e in expected}))
    report.figure("thread_errors", sum(found))


def route_many(report: Report, *, experts: int, width: int, queries: int, clock: str) -> None:
    """Route queries one by one among very many experts."""
    from composer.retrieval.facts import ExpertFacts
    from composer.retrieval.options import RetrievalRouter
    from composer.retrieval.router import Router
    from composer.retrieval.scorers.centroid import Centroid
    from composer.retrieval.selectors import Top1

    generator = np.random.default_rng(4)
    sums = generator.normal(size=(experts, width))
    facts = [ExpertFacts(name=f"o{i:06d}/x", count=1.0, sum=row) for i, row in enumerate(sums)]
    router = Router(
        facts,
        scorer=Centroid(RetrievalRouter(), similarity="cosine"),
        selector=Top1(temperature=1.0),
        min_margin=0.0,
        temperature=1.0,
    )
    everybody = np.ones((1, experts), dtype=np.bool_)
    features = generator.normal(size=(queries, width))
    router.decide(features[:1], everybody)  # solves the router
    samples = [
        report.run("route", timed(partial(router.decide, features[i : i + 1], everybody)), experts=experts)
        for i in range(queries)
    ]
    report.figure("route_100k_ms", 1e3 * float(np.median(times(samples, clock))))


def index_speed(report: Report, work: Path, *, documents: int, rows: int, clock: str) -> None:
    """Encode documents into an index on disk; and write vectors that are there already into another."""
    from composer.loading import load
    from pipelines.retrieval.index import create_index

    model = load(work / "query_cost")
    bodies = [" ".join(texts(4, seed=number)) for number in range(documents)]
    width = model.get_embedding_dimension()
    vectors = np.random.default_rng(5).normal(size=(rows, width)).astype(np.float32)

    def encoded() -> None:
        index = create_index(work / "encoded", base="0" * 64, dimension=width)
        index.add([f"d{i:07d}" for i in range(documents)], model.encode_document(bodies, batch_size=BATCH))
        index.save()

    def written() -> None:
        index = create_index(work / "written", base="0" * 64, dimension=width)
        index.add([f"d{i:07d}" for i in range(rows)], vectors)
        index.save()

    for name, job, count in (("docs", encoded, documents), ("vectors", written, rows)):
        sample = report.run(f"index-{name}", timed(job), documents=count)
        report.figure(f"index_{name}_per_second", count / times([sample], clock)[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    options = arguments(__doc__, rounds=8).parse_args(argv)
    tiny, clock = options.tiny, options.clock
    report = Report(name="retriever", aims=AIMS)
    with working_folder(options.work) as work, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that make the models
        prepare(work, tiny=tiny)
        batches = 1 if tiny else 4
        query_costs(report, work, rounds=options.rounds, clock=clock, batches=batches)
        mixed_cost(report, work, rounds=options.rounds, clock=clock, batches=batches)
        thread_errors(report, work, calls=80 if tiny else 10_000)
        experts, width, queries = (5000, 16, 2) if tiny else (100_000, 384, 50)
        route_many(report, experts=experts, width=width, queries=queries, clock=clock)
        documents, rows = (8, 64) if tiny else (512, 50_000)
        index_speed(report, work, documents=documents, rows=rows, clock=clock)
    report.write(options.out)


if __name__ == "__main__":
    main()
