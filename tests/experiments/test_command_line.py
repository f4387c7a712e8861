"""Both commands on a tiny model, through `main(argv)`."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from matplotlib.image import imread

from experiments.__main__ import main
from experiments.common import command as experiments_command
from experiments.common.devices import join_processes
from experiments.common.record import read_records

PROMPT = " ".join(f"t{3 + i % 50}" for i in range(40))


def run_recorded(tmp_path, *argv):
    """Runs a command and returns its record's result."""
    record = tmp_path / "record.jsonl"
    assert main([*argv, "--record", str(record)]) == 0
    return read_records(record)[-1]["result"]


def test_generate_answers_and_reports(tiny_model, capsys, tmp_path):
    result = run_recorded(
        tmp_path, "generate", "--model", tiny_model, "--prompt", PROMPT, "--max-new-tokens", "5"
    )
    shown = capsys.readouterr().out
    answer = result["outcomes"][0]["generation"]
    assert result["prompt_tokens"] == 40
    assert len(answer["tokens"]) == 5
    assert answer["text"] == " ".join(f"t{token}" for token in answer["tokens"])
    assert answer["text"] in shown
    for words in ("time to first token", "compilation", "causal pairs visited", "peak memory"):
        assert words in shown


def test_a_part_of_the_keys_is_kept(tiny_model, tmp_path):
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    argv = ["--model", tiny_model, "--prompt", PROMPT, "--attention", "dense"]
    [kept] = run_recorded(
        tmp_path, "generate", *argv, "--max-new-tokens", "3", "--kv-cache", "pyramidkv:34"
    )["outcomes"]
    assert kept["name"] == "dense, pyramidkv:34"
    width = config["head_dim"] * config["num_key_value_heads"]
    # 32 keys are the window; layers keep 2 more on average, the first one 4; 3 are new.
    assert kept["cache_bytes"] == 2 * 2 * (32 + 4 + 3) * width * 4


def test_what_is_kept_in_8_bits_and_what_is_not_kept(tiny_model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(experiments_command, "device_memory", lambda: 2**40)
    argv = ["--model", tiny_model, "--prompt", PROMPT, "--attention", "dense"]
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    width = config["head_dim"] * config["num_key_value_heads"]
    for command, kept, size in (
        (["generate", "--max-new-tokens", "3"], "int8", 2 * 2 * 43 * width),
        (["prefill"], "none", 0),
    ):
        [found] = run_recorded(tmp_path, *command, *argv, "--kv-cache", kept)["outcomes"]
        assert (found["name"], found["cache_bytes"]) == (f"dense, {kept}", size)
        assert "memory: about 0.0 of 1024.0 GiB" in capsys.readouterr().err


def test_memory_is_estimated_part_by_part_without_a_run(tiny_model, capsys, monkeypatch):
    monkeypatch.setattr(experiments_command, "load", None)
    argv = ["prefill", "--model", tiny_model, "--prompt", PROMPT, "--estimate-memory"]
    assert main(argv) == 0
    shown = capsys.readouterr().out
    for words in ("40 tokens", "weights", "keys and values kept", "at once", "no limit"):
        assert words in shown


def test_devices_share_the_model_and_the_prompt(tiny_model, capsys, tmp_path):
    argv = [
        "--model",
        tiny_model,
        "--prompt",
        PROMPT,
        "--attention",
        "dense",
        "--mesh",
        "tp=2,cp=2",
    ]
    [found] = run_recorded(tmp_path, "generate", *argv, "--max-new-tokens", "3")["outcomes"]
    argv = argv[:-2]
    [wanted] = run_recorded(tmp_path, "generate", *argv, "--max-new-tokens", "3")["outcomes"]
    assert found["generation"]["tokens"] == wanted["generation"]["tokens"]
    np.testing.assert_array_equal(found["density"], wanted["density"])
    assert main(["prefill", *argv, "--mesh", "tp=2,cp=64", "--estimate-memory"]) == 0
    assert "for each device of tp=2,cp=64" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--mesh", "pp=2"], "must be tp=N, cp=N or tp=N,cp=N, got pp=2"),
        (["--mesh", "tp=8"], "needs 8, there are 4"),
        (["--mesh", "tp=3"], "3 devices cannot share the model evenly"),
        (["--mesh", "cp=2", "--chunk-size", "16"], "leave out --chunk-size"),
        (["--mesh", "cp=2", "--plot", "plots"], "leave out --mesh"),
    ],
)
def test_what_devices_cannot_share(tiny_model, capsys, monkeypatch, tmp_path, options, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiments_command, "load", None)
    assert main(["prefill", "--model", tiny_model, "--prompt", PROMPT, *options]) == 2
    assert words in capsys.readouterr().err


def test_processes_join_where_the_environment_says_so(monkeypatch, capsys):
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **how: joined.append(how))
    assert not join_processes()
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "first:1234")
    assert join_processes()
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert main(["report"]) == 2
    assert "only `generate` and `prefill`" in capsys.readouterr().err
    found = {"num_processes": None, "process_id": None}, {"num_processes": 2, "process_id": 1}
    assert joined == list(found)
    monkeypatch.setenv("JAX_PROCESS_ID", "one")
    assert main(["report"]) == 2
    assert "'one'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "budget",
    [
        pytest.param(["--attention", "minference"], id="minference-default"),
        pytest.param(["--attention", "a_shape", "--window-size", "64"], id="a-shape"),
        pytest.param(["--attention", "tri_shape"], id="tri-shape"),
        pytest.param(["--attention", "block_sparse"], id="block-sparse"),
    ],
)
def test_budget_that_covers_the_prompt_agrees_with_dense(tiny_model, tmp_path, budget):
    asked, dense = run_recorded(
        tmp_path,
        "prefill",
        "--model",
        tiny_model,
        "--prompt",
        PROMPT,
        "--compare",
        "dense",
        *budget,
    )["outcomes"]
    assert dense["name"] == "dense"
    assert np.all(np.array(asked["density"]) == 1)
    assert asked["agreement"]["top1_equal"]
    assert asked["agreement"]["kl"] < 1e-6
    assert asked["next_token"] == dense["next_token"]


def test_small_budget_is_sparse_and_drawn(tiny_model, tmp_path):
    # A prompt longer than a tile of the kernel, or every pair would be visited.
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(f"t{3 + i * i % 50}" for i in range(500)))
    common = ["prefill", "--model", tiny_model, "--prompt-file", str(prompt)]
    scaled = ["--rope-scaling", "linear:8", "--attention", "a_shape"]
    budget = ["--sink-size", "8", "--window-size", "16"]
    pictures = ["--plot", str(tmp_path / "plots"), "--plot-layer", "1", "--plot-head", "3"]
    [outcome] = run_recorded(tmp_path, *common, *scaled, *budget, *pictures)["outcomes"]
    [chunked] = run_recorded(tmp_path, *common, *scaled, *budget, "--chunk-size", "96")["outcomes"]
    assert np.all(np.array(outcome["density"]) < 0.8)
    assert np.all(np.array(chunked["density"]) < 0.8)
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == ["density.png", "mask_layer1_head3.png"]
    for name in names:
        pixels = imread(tmp_path / "plots" / name)[..., :3]
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_record_holds_what_was_asked_and_where(tiny_model, tmp_path):
    record = tmp_path / "new folder" / "record.jsonl"
    for seed in ("1", "2"):
        argv = ["--model", tiny_model, "--prompt", "t4 t5", "--attention", "dense", "--seed", seed]
        assert main(["generate", *argv, "--temperature", "1", "--record", str(record)]) == 0
    first, second = read_records(record, kind="generate")
    assert [first["config"]["sampling"]["seed"], second["config"]["sampling"]["seed"]] == [1, 2]
    assert first["config"]["attention"]["attention"] == "dense"
    assert {"jax", "device", "cpus", "git", "argv", "date"} <= set(first["environment"])
    assert first["result"]["outcomes"][0]["generation"]["tokens"]


def test_record_names_a_long_prompt_by_its_hash(tiny_model, tmp_path):
    result = run_recorded(tmp_path, "prefill", "--model", tiny_model, "--prompt", PROMPT * 2)
    [record] = read_records(tmp_path / "record.jsonl")
    assert len(record["config"]["prompt"]["prompt"]) < 210
    assert result["prompt_sha256"] == hashlib.sha256((PROMPT * 2).encode()).hexdigest()


def test_sampling_depends_on_the_seed_alone(tiny_model, tmp_path):
    def tokens(seed):
        sampling = ["--temperature", "2", "--seed", seed, "--max-new-tokens", "8"]
        argv = ["--model", tiny_model, "--prompt", PROMPT, "--attention", "dense", *sampling]
        return run_recorded(tmp_path, "generate", *argv)["outcomes"][0]["generation"]["tokens"]

    assert tokens("1") == tokens("1")
    assert tokens("1") != tokens("2")


def test_pattern_file_of_the_original_project(tiny_model, tmp_path):
    layer = {str(head): ["vertical_and_slash", 30, 100, 1] for head in range(4)}
    patterns = tmp_path / "patterns.json"
    patterns.write_text(json.dumps([layer, layer]))
    result = run_recorded(
        tmp_path, "prefill", "--model", tiny_model, "--prompt", PROMPT, "--patterns", str(patterns)
    )
    assert "patterns.json" in result["outcomes"][0]["description"]
