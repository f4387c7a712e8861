"""What the documents say is there: files, options, code that runs, versions that agree."""

import re
import shlex
import tomllib
from pathlib import Path

import jax
import pytest
import tyro

from experiments.__main__ import Command, main
from tests.models.checkpoints import golden, write_hf

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part == "outputs" for part in path.relative_to(ROOT).parts)
)
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_point_to_files(path):
    links = re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_marks_of_a_merge_are_left(path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^(?:<{7} .*|={7}|>{7} .*)$", text, flags=re.MULTILINE) == []


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    folders = "pallas_kernels|minference_jax|models|experiments|tests"
    named = re.findall(rf"`((?:{folders})/[\w./]*)`", text)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_options_in_the_readme_exist(capsys):
    analyses = ("distribution", "coverage", "recall", "maps", "sparsity", "decoding")
    names = (
        "generate", "prefill", "search", "compare", "needle", "ruler", "infinitebench", "scbench",
        "perplexity", "latency", "ttft", "visited", "report",
    )  # fmt: skip
    commands = [[name] for name in names]
    for command in commands + [["patterns", name] for name in analyses]:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][\w-]+", README))
    assert {"--attention", "--compare"} <= named
    assert named <= known


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_that_documents_show_are_accepted(path):
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    shown = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    for line in re.findall(r"^minference .*$", shown, flags=re.MULTILINE):
        tyro.cli(Command, args=shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_code_runs(number, tmp_path, monkeypatch):
    config, tensors, _ = golden("llama-gqa")
    write_hf(tmp_path / "model.gguf", config, tensors)  # a directory, in spite of its name
    monkeypatch.chdir(tmp_path)
    names = {}
    # A reader's session has JAX's own settings.
    with jax.numpy_rank_promotion("allow"):
        exec(SNIPPETS[number], names)
    if "density" in names:
        assert names["density"].shape == (2, 1, 4)
    if "visited" in names:
        assert names["visited"].shape == (1, 8, 2000, 2000)


def test_versions_agree():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    [cited] = re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE)
    assert cited == project["version"]
    [demo] = project["optional-dependencies"]["demo"]
    assert f" {demo}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
