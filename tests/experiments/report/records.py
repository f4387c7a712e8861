"""Records as the commands write them, with figures chosen for tests."""

import json

import numpy as np

from experiments.common.options import LoadOptions, ModelOptions
from experiments.common.record import make_record
from experiments.compare.rows import Point
from experiments.evaluation.run import means
from experiments.evaluation.stages import Score
from experiments.latency.rows import Point as Timed
from experiments.needle import samples as needle
from experiments.needle.command import Needle
from experiments.perplexity import measure
from experiments.perplexity.command import Perplexity
from experiments.ruler.command import Ruler
from experiments.scbench.command import SCBench

MODEL = ModelOptions(model="somewhere/tiny.gguf")
GIT = "0123456789abcdef"


def score(name, value, task="needle", length=100, **costs):
    costs = {
        "density": 0.5,
        "prefill_seconds": 2.0,
        "decode_seconds": 1.0,
        "cache_bytes": 2**20,
    } | (costs)
    return Score(name=name, task=task, length=length, score=value, **costs)


def needles(values, length=100, **costs):
    """Scores of needles: two of each depth, from 0 to 100 %."""
    depths = np.linspace(0, 100, len(values) // 2)
    names = [needle.sample_name(length, depth, n) for depth in depths for n in range(2)]
    return [
        score(name, float(v), length=length, **costs) for name, v in zip(names, values, strict=True)
    ]


def scored(scores):
    return {
        "means": [mean._asdict() for mean in means(scores)],
        "scores": {one.name: one.score for one in scores},
    }


def record(config, method, result, kind=None, **environment):
    kind = config.kind if kind is None else kind
    about = {"method": method, "patterns_sha256": None, "model_sha256": "0"}
    made = make_record(kind=kind, argv=["minference"], config=config, result=about | result)
    made["environment"] |= {
        "git": GIT,
        "date": "2026-01-02T00:00:00",
        "device": "cpu",
    } | environment
    return made


def found(method, values, config=None, **environment):
    """A needle record of one length."""
    config = Needle(model=MODEL, lengths=(100,), depths=2) if config is None else config
    return record(config, method, scored(needles(values)), **environment)


def write(path, *records):
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def write_every_kind(folder):
    """Small records of every kind."""
    costs = {"prefill_seconds": 0.5, "density": 0.125}
    config = Needle(model=MODEL, lengths=(100, 200), depths=2)
    grid = [*needles([1, 1, 0, 1]), *needles([1, 0, 0, 0], 200, prefill_seconds=8.0)]
    sparse = [*needles([1, 1, 0, 0], **costs), *needles([1, 0, 0, 0], 200, **costs)]
    write(
        folder / "needle.jsonl",
        record(config, "dense", scored(grid)),
        record(config, "minference", scored(sparse)),
        record(config, "minference+snapkv:64", scored(sparse)),
    )
    tasks = [
        score(f"{task}-{length}-{n}", 1.0 if length == 4096 else 0.5, task, length)
        for length in (4096, 8192)
        for task in ("vt", "niah_single_1")
        for n in range(2)
    ]
    config = Ruler(model=MODEL, lengths=(4096, 8192))
    write(
        folder / "ruler.jsonl",
        record(config, "dense", scored(tasks)),
        record(config, "minference", scored(tasks)),
    )
    turns = [
        score(f"{task}, turn {t}, 100 tokens, 0", 1.0, f"{task}, turn {t}")
        for task in ("retr_kv", "needles")
        for t in (1, 2)
    ]
    modes = {mode: scored(turns) for mode in ("multi_turn", "shared_context")}
    write(folder / "scbench.jsonl", record(SCBench(model=MODEL, turns=2), "b", {"modes": modes}))
    rows = [
        measure.Row(
            text=name, sha256=name, length=100, dense_nll=2.0, nll=2.0 + more, kl=0.1, top1=0.9,
            density=0.5,
        )
        for name, more in (("one", 0.01), ("two", 0.03))
    ]  # fmt: skip
    write(
        folder / "perplexity.jsonl",
        record(
            Perplexity(model=LoadOptions(model="tiny.gguf")),
            "b",
            {
                "means": [mean._asdict() for mean in measure.means(rows)],
                "rows": [row.__dict__ for row in rows],
            },
            kind="perplexity",
        ),
    )
    figures = {
        "executed": 0.2, "visited": 0.1, "kl": 0.01, "top1": 0.5, "perplexity": 2.0,
        "answer_right": None, "prefill_seconds": [3.0],
    }  # fmt: skip
    compared = [
        record(
            Point(
                model="tiny", model_sha256="0", prompt="book 0", task="book", prompt_sha256="0",
                tokens=9, length=9, method=method, patterns_sha256=None, positions=9, repeats=1,
            ),
            method, figures, kind="compare", git=git,
        )
        for method, git in (("dense", GIT), ("a_shape:1,2", GIT), ("b", "fedcba98"))
    ]  # fmt: skip
    write(folder / "compare.jsonl", *compared)
    point = Timed(
        level="layer", name="a_shape-1-2", layer="tiny", length=8192, heads=2, kv_heads=1,
        head_dim=64, dtype="float32", seed=0,
    )  # fmt: skip
    timed = {"ms": 2.0, "tflops": 1.0, "density": 0.5, "speedup": 3.0}
    write(
        folder / "latency.jsonl",
        record(point, "", timed, kind="latency"),
        record(point, "", timed | {"ms": 4.0}, kind="latency", git="fedcba98"),
    )
