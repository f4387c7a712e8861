"""`minference report`: its pages and pictures, and what it tells of files it cannot read."""

import json
import re

from experiments.__main__ import main
from tests.experiments.report.records import found, write, write_every_kind


def test_every_kind_has_its_tables_pictures_and_headline(tmp_path, capsys):
    run, output, readme = tmp_path / "run", tmp_path / "out", tmp_path / "README.md"
    run.mkdir()
    write_every_kind(run)
    for name in ("samples", "other"):
        write(run / f"{name}.jsonl", {"name": "a"})
    readme.write_text("before\n<!-- results: begin -->old<!-- results: end -->\nafter\n")
    argv = ["report", str(run), "--output", str(output), "--readme", str(readme)]
    assert main(argv) == 0
    told_of = f"left out, without records that a report shows: {run / 'other.jsonl'}"
    assert [told_of] == capsys.readouterr().err.splitlines()
    text = (output / "README.md").read_text()
    pictures = re.findall(r"\]\((pictures/[^)]*)\)", text)
    assert len(pictures) == 11
    assert all((output / name).exists() for name in pictures)
    assert (output / "pictures" / "needle.png").exists()
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
