"""`minference compare`: lines over all prompts."""

import pytest

from experiments.compare.rows import Point, Row
from experiments.compare.summary import markdown, summarise


def row(method, prompt, made=("cpu", "1"), **result):
    task, _ = prompt.split()
    point = Point(
        model="m", model_sha256="0", prompt=prompt, task=task, prompt_sha256=prompt, tokens=9,
        length=9, method=method, patterns_sha256=None, positions=9, repeats=1,
    )  # fmt: skip
    result = {
        "executed": 0.2, "visited": 0.1, "kl": 0.5, "top1": 0.5, "perplexity": 2.0,
        "answer_right": None, "prefill_seconds": [3.0, 1.0, 9.0],
    } | result  # fmt: skip
    return Row(point, result, made)


def test_lines_are_over_prompts():
    rows = [
        row("dense", "book 0", perplexity=2.0), row("dense", "code 0", perplexity=10.0),
        row("dense", "needle 0", answer_right=True, perplexity=99.0),
        row("a_shape:1,2", "book 0", kl=9.0),  # measured again below
        row("a_shape:1,2", "book 0", perplexity=4.0, kl=0.5, prefill_seconds=[5.0]),
        row("a_shape:1,2", "code 0", perplexity=20.0, kl=2.5, executed=0.6),
        row("a_shape:1,2", "needle 0", answer_right=True, perplexity=1.0, kl=0.0, executed=0.1),
        row("a_shape:1,2", "needle 1", answer_right=False, prefill_seconds=[4.0], kl=1.0),
    ]  # fmt: skip
    [(group, lines)] = summarise(rows).items()
    assert group.prompts == ("book 0", "code 0", "needle 0", "needle 1")
    dense, line = lines
    assert (dense.method, dense.perplexity_change, dense.answers) == (
        "dense",
        0.0,
        {"needle": (1, 1)},
    )
    assert (line.prompts, line.kl, line.answers) == (4, 1.0, {"needle": (1, 2)})
    assert line.executed == pytest.approx((0.2 + 0.6 + 0.1 + 0.2) / 4)
    assert line.perplexity_change == pytest.approx(1.0)  # the needles' does not count
    assert line.prefill_seconds == 3.5  # of 5, 3, 3, 4
    text = markdown({group: lines})
    assert "| a_shape:1,2 | 4 | 27.5% | 10.0% | 1 | 50.0% | +100.00% | 3.5 s | 1/2 |" in text


def test_rows_made_under_other_conditions_are_not_mixed():
    rows = [row("dense", "book 0", ("cpu", "old")), row("dense", "book 1", ("cpu", "new"), kl=0.0)]
    [(group, [line])] = summarise(rows).items()
    assert (group.prompts, line.kl) == (("book 1",), 0.0)
