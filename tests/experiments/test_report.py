"""`minference report`: what may stand in one table, its figures, and the committed tables."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.__main__ import main
from experiments.common.options import LoadOptions, ModelOptions
from experiments.common.record import make_record
from experiments.compare.rows import Point
from experiments.evaluation.run import means
from experiments.evaluation.stages import Score
from experiments.infinitebench import tasks as infinitebench
from experiments.latency.rows import Point as Timed
from experiments.needle import samples as needle
from experiments.needle.command import Needle
from experiments.perplexity import measure
from experiments.perplexity.command import Perplexity
from experiments.report import paper
from experiments.report.headline import headline, replaced
from experiments.report.markdown import Drawing, text_of
from experiments.report.page import make_report, page
from experiments.report.pictures import spread
from experiments.report.read import read_entries
from experiments.report.scores import difference, estimate, parse_name, read_scores
from experiments.report.statistics import difference_of, mean_of
from experiments.report.study import studies
from experiments.ruler import samples as ruler
from experiments.ruler.command import Ruler
from experiments.scbench import samples as scbench
from experiments.scbench.command import SCBench
from models import load_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "experiments" / "results"
QUIET = Console(quiet=True)
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
    about = {"method": method, "patterns_sha256": None}
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


def studies_of(*paths):
    return studies(read_entries(paths, QUIET), read_scores)


def test_wilsons_interval_ends_where_the_share_is_just_not_refuted():
    values = np.array([1.0] * 7 + [0.0] * 3)
    mean, low, high = mean_of(values, np.full(10, 0.1))
    assert mean == pytest.approx(0.7)
    for end in (low, high):  # its definition
        assert abs(0.7 - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / 10))
    assert low < 0.7 < high
    assert mean_of(np.ones(20), np.full(20, 0.05)).low < 0.9  # 20 of 20 prove no certainty


def test_the_interval_of_a_difference_is_agresti_and_mins():
    both, first, second, neither = 11, 6, 2, 5
    values = np.repeat([1.0, 1.0, 0.0, 0.0], [both, first, second, neither])
    others = np.repeat([1.0, 0.0, 1.0, 0.0], [both, first, second, neither])
    # Wald's interval of the table with half a pair more in each of its four cells.
    b, c, n = first + 0.5, second + 0.5, len(values) + 2
    centre, half = (b - c) / n, 1.959964 * np.sqrt(b + c - (b - c) ** 2 / n) / n
    ours = difference_of(values, others, np.full(len(values), 1 / len(values)))
    assert ours == pytest.approx((4 / 24, centre - half, centre + half))


@pytest.mark.parametrize(("samples", "right", "turned"), [(20, 0.9, 0.02), (60, 0.5, 0.3)])
def test_the_interval_of_a_difference_covers_it(samples, right, turned):
    rng, trials = np.random.default_rng(0), 1000
    true = (1 - 2 * right) * turned
    covered = plain = 0
    for _ in range(trials):
        others = (rng.random(samples) < right).astype(float)
        values = np.where(rng.random(samples) < turned, 1 - others, others)
        _, low, high = difference_of(values, others, np.full(samples, 1 / samples))
        covered += low <= true <= high
        error = np.std(values - others) / np.sqrt(samples)
        plain += abs(np.mean(values - others) - true) <= 1.96 * error
    assert covered / trials >= 0.95
    # What a standard error alone would claim when few answers turn.
    assert turned > 0.1 or plain / trials < 0.5


def test_samples_of_unlike_weight_count_as_fewer():
    values = np.array([1.0, 0.0, 1.0, 0.0])
    even = mean_of(values, np.full(4, 0.25))
    uneven = mean_of(values, np.array([0.45, 0.45, 0.05, 0.05]))
    assert uneven.high - uneven.low > even.high - even.low


def test_names_are_those_that_the_commands_give(tiny_model):
    assert parse_name("needle", needle.sample_name(100, 33.33, 2)) == {
        "length": "100",
        "depth": "33.33",
    }
    for kind, module in (("ruler", ruler), ("infinitebench", infinitebench)):
        name = module.sample_name("niah_single_1", 4096, 3)
        assert parse_name(kind, name) == {"task": "niah_single_1", "length": "4096"}
    conversation = scbench.drafts(
        load_model(tiny_model, dtype=jnp.float32), tasks=["retr_kv"], lengths=[100], samples=1,
        turns=2, text="", seed=0, chat=False,
    )  # fmt: skip
    assert parse_name("scbench", conversation[-1].name) == {
        "task": "retr_kv, turn 2",
        "length": "100",
        "unit": "0",
    }
    with pytest.raises(ValueError, match="no name of a sample"):
        parse_name("needle", "niah-1-2")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"git": "fedcba9876543210"}, "revision"),
        ({"device": "another"}, "device"),
        ({"jax": "0.0"}, "jax"),
        ({"seed": 1}, "seed"),
        ({"rounds": 2}, "rounds"),
        ({"samples": 1}, "samples"),
    ],
)
def test_results_of_other_conditions_are_in_tables_of_their_own(tmp_path, change, differs):
    options = {name: value for name, value in change.items() if hasattr(Needle, name)}
    config = Needle(model=MODEL, lengths=(100,), depths=2, **options)
    environment = {name: change[name] for name in change if name in ("git", "device", "jax")}
    values = [1, 0] if "samples" in change else [1, 0, 0, 1]
    path = write(
        tmp_path / "a.jsonl",
        found("dense", [1, 1, 0, 1]),
        found("a_shape:1,2", [1, 1, 0, 0]),
        found("b", values, config, **environment),
    )
    one, other = studies_of(path)
    assert list(one.methods) == ["dense", "a_shape:1,2"]
    assert list(other.methods) == ["b"]
    assert other.apart == [differs]
    assert f"it differs from others in {differs}" in other.caption(tmp_path, "")


def test_batches_of_other_sizes_are_one_table_which_names_them(tmp_path):
    config = Needle(model=MODEL, lengths=(100,), depths=2, batch_size=5)
    path = write(
        tmp_path / "a.jsonl",
        found("dense", [1, 1, 0, 1]),
        found("b", [1, 0, 0, 1], config),
    )
    [study] = studies_of(path)
    assert list(study.methods) == ["dense", "b"]
    assert "batch size 1 and 5" in study.caption(tmp_path, "")


def test_the_same_conditions_are_one_table_whatever_the_file(tmp_path):
    elsewhere = Needle(
        model=ModelOptions(model="other/folder/tiny.gguf"), lengths=(100,), depths=2,
        methods=("b",), output=Path("other"),
    )  # fmt: skip
    a = write(tmp_path / "a.jsonl", found("b", [1, 1, 1, 1]))
    b = write(tmp_path / "b.jsonl", found("dense", [1, 1, 0, 1], elsewhere))
    [study] = studies_of(a, b, a)
    assert list(study.methods) == ["dense", "b"]
    assert study.files == [a, b]
    # A second result of a method is neither lost nor mixed in.
    again = write(tmp_path / "c.jsonl", found("b", [0, 0, 0, 0]))
    first, second = studies_of(a, b, again)
    assert [estimate(x, "b", [("needle", 100)]).mean for x in (first, second)] == [1, 0]


@pytest.mark.parametrize("git", [None, GIT + "+changes"])
def test_a_revision_that_does_not_say_what_ran_is_of_one_file(tmp_path, git):
    records = [found("dense", [1, 1, 1, 1], git=git), found("b", [1, 1, 1, 1], git=git)]
    assert len(studies_of(write(tmp_path / "a.jsonl", *records))) == 1
    paths = [write(tmp_path / f"{n}.jsonl", one) for n, one in enumerate(records)]
    assert len(studies_of(*paths)) == 2


def test_tasks_count_the_same_and_turns_are_no_samples_of_their_own(tmp_path):
    few = [score(f"vt-100-{n}", v, "vt") for n, v in enumerate([1.0, 0.0])]
    many = [score(f"cwe-100-{n}", 0.25, "cwe") for n in range(8)]
    path = write(
        tmp_path / "a.jsonl", record(Ruler(model=MODEL, lengths=(256,)), "b", scored(few + many))
    )
    [study] = studies_of(path)
    cells = [("vt", 100), ("cwe", 100)]
    assert estimate(study, "b", cells).mean == pytest.approx((0.5 + 0.25) / 2)

    def turns(right):
        return [
            score(f"needles, turn {t}, 100 tokens, {n}", float(right[n]), f"needles, turn {t}")
            for n in range(4)
            for t in (1, 2, 3)
        ]

    config = SCBench(model=MODEL, turns=3, modes=("multi_turn",))
    path = write(
        tmp_path / "b.jsonl",
        record(config, "dense", {"modes": {"multi_turn": scored(turns([1, 1, 1, 0]))}}),
        record(config, "b", {"modes": {"multi_turn": scored(turns([1, 0, 1, 0]))}}),
    )
    [study] = studies_of(path)
    cells = [(f"needles, turn {t}", 100) for t in (1, 2, 3)]
    # As if each conversation were one sample.
    alone = difference_of(np.array([1.0, 0, 1, 0]), np.array([1.0, 1, 1, 0]), np.full(4, 0.25))
    assert difference(study, "b", cells, "dense") == pytest.approx(alone)


def whole(tmp_path):
    """Small records of every kind."""
    costs = {"prefill_seconds": 0.5, "density": 0.125}
    config = Needle(model=MODEL, lengths=(100, 200), depths=2)
    grid = [*needles([1, 1, 0, 1]), *needles([1, 0, 0, 0], 200, prefill_seconds=8.0)]
    sparse = [*needles([1, 1, 0, 0], **costs), *needles([1, 0, 0, 0], 200, **costs)]
    write(
        tmp_path / "needle.jsonl",
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
        tmp_path / "ruler.jsonl",
        record(config, "dense", scored(tasks)),
        record(config, "minference", scored(tasks)),
    )
    turns = [
        score(f"{task}, turn {t}, 100 tokens, 0", 1.0, f"{task}, turn {t}")
        for task in ("retr_kv", "needles")
        for t in (1, 2)
    ]
    modes = {mode: scored(turns) for mode in ("multi_turn", "shared_context")}
    write(tmp_path / "scbench.jsonl", record(SCBench(model=MODEL, turns=2), "b", {"modes": modes}))
    rows = [
        measure.Row(
            text=name, sha256=name, length=100, dense_nll=2.0, nll=2.0 + more, kl=0.1, top1=0.9,
            density=0.5,
        )
        for name, more in (("one", 0.01), ("two", 0.03))
    ]  # fmt: skip
    write(
        tmp_path / "perplexity.jsonl",
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
    write(tmp_path / "compare.jsonl", *compared)
    point = Timed(
        level="layer", name="a_shape-1-2", layer="tiny", length=8192, heads=2, kv_heads=1,
        head_dim=64, dtype="float32", seed=0,
    )  # fmt: skip
    timed = {"ms": 2.0, "tflops": 1.0, "density": 0.5, "speedup": 3.0}
    write(
        tmp_path / "latency.jsonl",
        record(point, "", timed, kind="latency"),
        record(point, "", timed | {"ms": 4.0}, kind="latency", git="fedcba98"),
    )


def test_every_kind_has_its_tables_pictures_and_headline(tmp_path, capsys):
    run, output, readme = tmp_path / "run", tmp_path / "out", tmp_path / "README.md"
    run.mkdir()
    whole(run)
    write(run / "samples.jsonl", {"name": "a"})
    readme.write_text("before\n<!-- results: begin -->old<!-- results: end -->\nafter\n")
    argv = ["report", str(run), "--output", str(output), "--readme", str(readme)]
    assert main(argv) == 0
    assert "left out: 1 files without records" in capsys.readouterr().err
    text = (output / "README.md").read_text()
    pictures = re.findall(r"\]\((pictures/[^)]*)\)", text)
    assert len(pictures) == 11
    assert all((output / name).exists() for name in pictures)
    assert (output / "pictures" / "needle-tiny.gguf.png").exists()
    for line in (
        "| minference | 50.0 | 25.0 | 37.5 [13.7, 69.4] | -12.5 [-37.0, +17.0] | 12.5 | 0.5 | 1 |",
        "| 200 | minference | 25.0 | 12.5 | 0.5 | 1 | 1 | 16.00 |",
        "| dense | 100.0 | 50.0 | 75.0 [40.9, 92.9] |  | 4,096 | 50.0 | 2 | 1 | 1 |",
        "| retrieval | dense | 100.0 | 50.0 |",
        "| minference | 0.0 [-32.7, +32.7]; +0.5, +0.4, +0.8 |",
        "| minference | 37.5 (1) | 37.5 (1) |",
        "| 100 | b | 7.538 | +2.02 ± 1.02 | 0.1000 | 90.0 | 50.0 |",
        "| b | 20.0% | 10.0% | 0.01 | 50.0% |  | 3 s |",
        "| 8,192 | layer | a_shape-1-2 | 4.00 |",
        "| MInference | 97.7 (+0.5) | 91.2 (-0.6) |",
    ):
        assert line in text, line
    assert text.count("### tiny, 9 tokens, 1 prompt") == 2  # of two revisions
    shown = readme.read_text()
    assert shown.startswith("before\n<!-- results: begin -->\n\n")
    assert shown.endswith("\n<!-- results: end -->\nafter\n")
    assert "old" not in shown
    assert "| `minference` | 37.5 [-37.0, +17.0]<br>12.5 %, 0.5 s |" in shown
    assert "| +2.02 ± 1.02<br>50.0 % |" in shown
    assert "(out/README.md)" in shown


def test_a_line_that_is_being_written_is_left_out_and_left_alone(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", found("dense", [1, 1, 0, 1]))
    content = path.read_text() + '{"schema": 1, "ki'
    path.write_text(content)
    assert main(["report", str(path), "--output", str(tmp_path / "out")]) == 0
    assert f"left out: {path}, line 2: it is cut off" in capsys.readouterr().err
    assert path.read_text() == content


def told(capsys, *argv):
    assert main(["report", *map(str, argv)]) == 2
    [*_, last] = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last


def test_what_cannot_be_read_is_told_with_file_and_line(tmp_path, capsys):
    good, bad = found("dense", [1, 1, 0, 1]), tmp_path / "bad.jsonl"
    assert "expected record files or folders of them, got none" in told(capsys)
    assert "no file or folder" in told(capsys, tmp_path / "none.jsonl")
    assert "no records in" in told(capsys, tmp_path)
    assert "holds no records" in told(capsys, write(bad))
    bad.write_bytes(b"\xff\n")
    assert f"cannot read {bad}" in told(capsys, bad)
    bad.write_text(json.dumps(good) + "\nno record\n")
    assert f"{bad}, line 2: not JSON" in told(capsys, bad)
    cases = [
        ({"schema": 9}, "expected a record of schema 1, got 9"),
        ({"kind": "search"}, "a record of kind 'search', which no table shows"),
        ({"config": None}, "a record without config"),
        ({"result": {"method": "b"}}, "not as this version of `minference needle` writes it"),
        ({"result": {"method": "b", "means": [], "scores": {}}}, "it holds no results"),
    ]
    for change, words in cases:
        message = told(capsys, write(bad, good, good | change))
        assert f"{bad}, line 2" in message
        assert words in message
    wrong = json.loads(json.dumps(good))
    wrong["result"]["means"][0]["score"] = 0.5
    assert "the mean of needle, 100 tokens is not that of its scores" in told(
        capsys, write(bad, wrong)
    )


def test_nothing_that_others_wrote_is_written_over(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", found("dense", [1, 1, 0, 1]))
    mine = tmp_path / "README.md"
    mine.write_text("mine")
    assert "was not made by this command" in told(capsys, path, "--output", tmp_path)
    output = tmp_path / "out"
    assert "has no lines" in told(capsys, path, "--output", output, "--readme", mine)
    assert mine.read_text() == "mine"
    assert not output.exists()


def test_labels_keep_their_order_and_their_distance():
    heights = {"a": 0.98, "b": 0.97, "c": 0.1, "d": 0.99, "e": 0.12, "f": 0.5}
    placed = spread(heights, gap=0.05)
    order = sorted(heights, key=lambda label: heights[label])
    assert sorted(placed, key=lambda label: placed[label]) == order
    at = [placed[label] for label in order]
    assert min(np.diff(at)) > 0.05 - 1e-9
    assert at[0] >= 0
    assert at[-1] <= 1 + 1e-9
    assert placed["f"] == pytest.approx(0.5)  # has room


def test_printed_averages_are_means_but_for_the_papers_own_slips():
    slips = []
    for one in (*paper.INFINITEBENCH, paper.SNAPKV, *paper.RULER):
        for method, (*values, average) in one.rows.items():
            assert len(values) == len(one.columns) - 1
            if abs(np.mean(values) - average) > 0.06:
                slips.append((one.name, one.model, method))
    assert slips == [
        ("Table 2", "Yi-9B-200K", "StreamingLLM, dilated"),
        ("Table 2", "Yi-9B-200K", "StreamingLLM, strided"),
        ("Table 3", "LLaMA-3-8B-262K", "StreamingLLM"),
        ("Table 3", "Yi-9B-200K", "full attention"),
        ("Table 3", "Yi-9B-200K", "StreamingLLM"),
        ("Table 3", "Yi-9B-200K", "StreamingLLM, strided"),
        ("Table 3", "Yi-9B-200K", "MInference"),
    ]


def test_committed_tables_are_those_of_the_committed_records():
    report = make_report(read_entries([RESULTS], QUIET))
    blocks = list(page(report, RESULTS))
    advice = "run `make report` and commit what it writes"
    assert text_of(blocks) == (RESULTS / "README.md").read_text(encoding="utf-8"), advice
    drawn = [block.file for block in blocks if isinstance(block, Drawing)]
    assert [name for name in drawn if not (RESULTS / name).exists()] == [], advice
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    section = headline(report, RESULTS / "README.md", ROOT)
    assert replaced(text, section, readme) == text, advice
