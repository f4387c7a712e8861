"""The paper's tables and those of the committed records."""

from pathlib import Path

import numpy as np
from rich.console import Console

from experiments.report import paper
from experiments.report.headline import headline, replaced
from experiments.report.markdown import Drawing, text_of
from experiments.report.page import make_report, page
from experiments.report.read import read_entries

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "experiments" / "results"
QUIET = Console(quiet=True)


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
