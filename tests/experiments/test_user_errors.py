"""Input that cannot be used: exit code 2 and one line on standard error, never a traceback."""

import json
import os

import jax
import pytest

from experiments.__main__ import main
from experiments.common import command

ASK = ["generate", "--model", "x", "--prompt", "a"]
ORIGINAL = [{"0": ["vertical_and_slash", 30, 100, 1]}]


def told(capsys, *argv):
    """Runs a command that must fail, and returns the message."""
    assert main([str(word) for word in argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(
            [],
            "Expected one of {generate, prefill, search, compare, compare-summary, needle, "
            "ruler, infinitebench, scbench, perplexity, report, latency, ttft, patterns, "
            "visited}",
            id="no-command",
        ),
        pytest.param(["generate"], "--model", id="no-model"),
        pytest.param(["prefill", "--model", "x"], "got neither", id="no-prompt"),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--prompt-file", "b"],
            "got both",
            id="two-prompts",
        ),
        pytest.param(["prefill", "--model", "x", "--prompt", " "], "empty", id="empty-prompt"),
        pytest.param(
            ["prefill", "--model", "x", "--prompt-file", "none.txt"], "none.txt", id="prompt-file"
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--attention", "spiral"],
            "'tri_shape'",
            id="unknown-pattern",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--vertical-size", "-4"],
            "at least 0, got -4",
            id="negative-budget",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--slash-size", "many"],
            "--slash-size",
            id="budget-no-number",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--num-blocks", "4"],
            "does not apply to --attention minference",
            id="foreign-budget",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--attention", "dense", "--patterns", "p"],
            "belongs to --attention minference",
            id="patterns-without-minference",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--patterns", "none.json"],
            "no pattern file at none.json, and none of this name is shipped; shipped are:",
            id="missing-patterns",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--rope-scaling", "spiral:2"],
            "yarn:FACTOR",
            id="rope-scaling",
        ),
        pytest.param(
            ["generate", "--model", "x", "--prompt", "a", "--top-p", "0.9"],
            "--temperature",
            id="top-p-when-greedy",
        ),
        pytest.param(
            ["generate", "--model", "x", "--prompt", "a", "--max-new-tokens", "0"],
            "at least 1, got 0",
            id="no-new-tokens",
        ),
        pytest.param(
            [*ASK, "--kv-cache", "snapkv"],
            "pyramidkv:BUDGET, streaming:FIRST,LAST, or int8, fp8, int8:ONE_OF_THESE, got snapkv",
            id="kv-cache-without-budget",
        ),
        pytest.param(
            [*ASK, "--kv-cache", "streaming:4"],
            "streaming:FIRST,LAST, or int8, fp8, int8:ONE_OF_THESE, got streaming:4",
            id="kv-cache-one-size",
        ),
        pytest.param([*ASK, "--kv-cache", "int8:fp8"], "got int8:fp8", id="kv-cache-8-bits-twice"),
        pytest.param([*ASK, "--kv-cache", "none"], "got none", id="kv-cache-none-of-a-generation"),
        pytest.param(
            [*ASK, "--kv-cache", "snapkv:32"],
            "a budget of 32",
            id="kv-cache-small-budget",
        ),
        pytest.param(
            [*ASK, "--kv-cache", "snapkv:64", "--chunk-size", "8"],
            "leave out --chunk-size",
            id="kv-cache-in-chunks",
        ),
        pytest.param(
            ["prefill", "--model", "x", "--prompt", "a", "--kv-cache", "fp8", "--chunk-size", "8"],
            "leave out --chunk-size",
            id="prefill-kv-cache-in-chunks",
        ),
    ],
)
def test_options(capsys, argv, words):
    assert words in told(capsys, *argv)


def test_a_prompt_too_large_for_the_device_is_told_before_the_weights_are_read(
    capsys, tiny_model, monkeypatch
):
    monkeypatch.setattr(command, "device_memory", lambda: 2**12)
    monkeypatch.setattr(command, "load", None)  # not even tried
    message = told(capsys, "prefill", "--model", tiny_model, "--prompt", "t1 t2")
    assert "weights 0.0" in message
    assert "--kv-cache int8" in message
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION" in message


def test_missing_model(capsys, tmp_path):
    message = told(capsys, "prefill", "--prompt", "a", "--model", tmp_path / "none.gguf")
    assert "none.gguf" in message


def test_corrupt_gguf(capsys, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(range(200)))
    assert "broken.gguf" in told(capsys, "prefill", "--prompt", "a", "--model", path)


def test_unsupported_architecture(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    assert "mamba" in told(capsys, "prefill", "--prompt", "a", "--model", tmp_path)


def test_missing_tokenizer(capsys, tiny_model, tmp_path):
    for name in ("config.json", "model.safetensors"):
        os.symlink(f"{tiny_model}/{name}", tmp_path / name)
    assert "tokenizer.json" in told(capsys, "prefill", "--prompt", "a", "--model", tmp_path)


def test_prompt_longer_than_the_context(capsys, tiny_model):
    prompt = " ".join(["t7"] * 5000)
    message = told(capsys, "generate", "--model", tiny_model, "--prompt", prompt)
    assert "5000 tokens" in message
    assert "--rope-scaling" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param(json.dumps(ORIGINAL * 2), "2 layers of 4 heads", id="too-few-heads"),
        pytest.param(json.dumps(ORIGINAL * 5), "describes 5 layers", id="too-many-layers"),
        pytest.param('[{"0": ["spiral", 1, 1, 1]}]', "spiral", id="unknown-pattern"),
        pytest.param("{", "not a JSON file", id="no-json"),
    ],
)
def test_pattern_files(capsys, tiny_model, tmp_path, content, words):
    path = tmp_path / "patterns.json"
    path.write_text(content)
    argv = ["--model", tiny_model, "--prompt", "t3 t4", "--patterns", path]
    assert words in told(capsys, "prefill", *argv)


@pytest.mark.parametrize("option", ["--record", "--plot"])
def test_output_that_cannot_be_written_is_told_before_the_model_is_loaded(capsys, tmp_path, option):
    (tmp_path / "file").write_text("")
    target = tmp_path / "file" / "inside"
    argv = ["--model", "no/such/model", "--prompt", "a", option, target]
    assert "cannot write" in told(capsys, "prefill", *argv)


@pytest.mark.parametrize(
    ("option", "number"), [("--plot-layer", 2), ("--plot-head", 4)], ids=["layer", "head"]
)
def test_drawn_head_that_the_model_does_not_have(capsys, tiny_model, tmp_path, option, number):
    argv = ["--model", tiny_model, "--prompt", "t3", "--plot", tmp_path, option, number]
    assert f"got {number}" in told(capsys, "prefill", *argv)


def test_memory_that_runs_out_is_told_with_ways_out(tiny_model, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 4.41GiB with allocator "
            "GPU_0_bfc on device 0. [executable_name='jit_read']"
        )

    monkeypatch.setattr("experiments.common.session.prefill", full)
    error = told(capsys, "prefill", "--model", tiny_model, "--prompt", "a")
    assert "Out of memory while trying to allocate 4.41GiB" in error
    assert "--kv-cache int8" in error
    assert "executable_name" not in error


def test_faults_of_the_program_keep_their_traceback(tiny_model, monkeypatch):
    def broken(*args, **kwargs):
        raise ValueError("a fault")

    monkeypatch.setattr("experiments.common.session.prefill", broken)
    with pytest.raises(ValueError, match="a fault"):
        main(["prefill", "--model", tiny_model, "--prompt", "t3"])


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prefill", "--help"])
    assert stop.value.code == 0
    assert "--slash-size" in capsys.readouterr().out
