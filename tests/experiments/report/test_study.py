"""What may stand in one table, and what its scores come to."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.common.options import LoadOptions, ModelOptions
from experiments.infinitebench import tasks as infinitebench
from experiments.needle import samples as needle
from experiments.needle.command import Needle
from experiments.perplexity import measure
from experiments.perplexity.command import Perplexity
from experiments.report.headline import headline
from experiments.report.markdown import text_of
from experiments.report.page import make_report, page
from experiments.report.read import read_entries
from experiments.report.scores import difference, estimate, parse_name, read_scores
from experiments.report.statistics import difference_of
from experiments.report.study import studies
from experiments.ruler import samples as ruler
from experiments.ruler.command import Ruler
from experiments.scbench import samples as scbench
from experiments.scbench.command import SCBench
from models import load_model
from tests.experiments.report.records import GIT, MODEL, found, record, score, scored, write

QUIET = Console(quiet=True)


def studies_of(*paths):
    return studies(read_entries(paths, QUIET), read_scores)


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
        ({"model_sha256": "1"}, "digest of the model"),
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
    other = found("b", values, config, **environment)
    other["result"]["model_sha256"] = change.get("model_sha256", "0")
    path = write(
        tmp_path / "a.jsonl",
        found("dense", [1, 1, 0, 1]),
        found("a_shape:1,2", [1, 1, 0, 0]),
        other,
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


def test_a_continuation_is_a_study_of_its_own_which_shows_the_cache(tmp_path):
    figures = {"text": "a", "sha256": "a", "length": 2000, "dense_nll": 2.0, "kl": 0.1}
    row = measure.Row(**figures, nll=2.01, top1=0.9, density=1.0)
    kept = dataclasses.replace(row, cache_bytes=3 * 2**19)

    def made(method, row, **options):
        config = Perplexity(model=LoadOptions(model="tiny.gguf"), **options)
        result = {"means": [one._asdict() for one in measure.means([row])], "rows": [vars(row)]}
        return record(config, method, result, kind="perplexity")

    old = made("dense", row)
    for line in (*old["result"]["means"], *old["result"]["rows"]):
        del line["cache_bytes"]  # as earlier revisions wrote it
    path = write(tmp_path / "a.jsonl", old, made("dense+int8", kept, continuation=512))
    report = make_report(read_entries([path], QUIET))
    whole, study = report.read
    assert (list(whole.methods), list(study.methods)) == (["dense"], ["dense+int8"])
    assert "in continuation" in study.caption(tmp_path, "")
    text = text_of(page(report, tmp_path))
    assert text.count("cache, MiB") == 1
    assert "### tiny.gguf, 2K tokens, continuations of 512\n" in text
    assert "| 2,000 | dense+int8 | 7.463 | +1.01 | 0.1000 | 90.0 | 100.0 | 1.5 |" in text
    shown = headline(report, tmp_path / "README.md", tmp_path)
    assert "perplexity --continuation 512, 2K tokens" in shown
    assert "| +1.01<br>100.0 %, 1.5 MiB |" in shown
