"""Evaluation runs: what a kill leaves, what a run refuses, what its stages make of samples."""

import dataclasses
import io
import itertools
import json
import shutil
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.common import record as records
from experiments.common.errors import UserError
from experiments.common.fingerprint import fingerprint
from experiments.common.methods import parse_method
from experiments.common.options import ModelOptions
from experiments.common.record import read_records
from experiments.evaluation import answer, begin, folder, predict, run, stages
from experiments.evaluation.answer import Answerer
from experiments.evaluation.folder import append_lines, claim, read_lines
from experiments.evaluation.options import Evaluation
from experiments.evaluation.run import make_room, means, table
from experiments.evaluation.sample import Sample
from experiments.evaluation.stages import Draft, Score, limited, prepare, score
from minference_jax import DenseAttention
from models import load_model
from models.common.decoder import forward

DENSE = DenseAttention()
LENGTHS = (40, 300)  # of one query tile, and of several
SPARSE = "block_mass:0.9+streaming:4,36"
METHODS = ("dense", SPARSE)
STAGES = ("samples", "predictions", "scores")


def question(length, number):
    rng = np.random.default_rng([length, number])
    words = rng.integers(3, 60, length - 4 - number)
    return Sample(
        name=f"{length} {number}",
        task="words",
        length=length,
        prompt=" ".join(f"t{word}" for word in words),
        lead=" t7 t8",
        answers=(f"t{number}",),
        max_new_tokens=3 if number == 0 else 2,
    )


def drafts(lengths=LENGTHS):
    return [
        Draft(f"{length} {number}", "words", length, lambda a=length, b=number: question(a, b))
        for length in lengths
        for number in range(4)
    ]


@pytest.fixture(scope="module")
def model(tiny_model):
    scaling = {"rope_type": "linear", "factor": 8.0}
    return load_model(tiny_model, dtype=jnp.float32, rope_scaling=scaling)


def length_of(sample, answer):
    return len(answer) / (len(answer) + sample.length)


@pytest.fixture(scope="module")
def answerer(model):
    return Answerer(model, chunk_size=None)


@pytest.fixture(autouse=True)
def no_time_passes(monkeypatch):
    """So that files of one run are those of another."""
    monkeypatch.setattr(answer, "time", SimpleNamespace(perf_counter=lambda: 0.0))


def run_stages(folder, answerer, *, lengths=LENGTHS, limit=None, spec="dense", batch_size=1):
    folder.mkdir(exist_ok=True)
    samples = prepare(folder, limited(drafts(lengths), limit))
    model, method = answerer.model, parse_method(spec)
    attention, compression = method.attention(2, 4), method.compression(2)
    predictions = predict.predict(
        folder, predict.tokenise(samples, model, chat=True),
        lambda batch: answerer(batch, attention, compression), model.tokenizer.decode,
        batch_size=batch_size, name=spec,
    )  # fmt: skip
    return samples, predictions, score(folder, samples, predictions, length_of)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, answerer):
    """The folder of a run that nothing stopped, and what it returned."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answer, "time", SimpleNamespace(perf_counter=lambda: 0.0))
        made = run_stages(folder, answerer)
    # Prompts of a length share their programs: reading, counting and decoding.
    assert len(answerer.programs) == 3 * len(LENGTHS)
    return folder, made


@pytest.mark.parametrize(
    "kept",
    [
        pytest.param({"samples": 0.5}, id="while-preparing"),
        pytest.param({"samples": 1, "predictions": 0.4}, id="while-predicting"),
        pytest.param({"samples": 1, "predictions": 1}, id="before-scoring"),
        pytest.param({"samples": 0.999, "predictions": 0.999, "scores": 0.5}, id="only-ends-lost"),
    ],
)
def test_a_killed_run_ends_with_the_files_of_an_unbroken_one(whole, answerer, tmp_path, kept):
    unbroken, _ = whole
    for stage, share in kept.items():
        content = (unbroken / f"{stage}.jsonl").read_bytes()
        (tmp_path / f"{stage}.jsonl").write_bytes(content[: int(share * len(content))])
    run_stages(tmp_path, answerer)
    for stage in STAGES:
        name = f"{stage}.jsonl"
        assert (tmp_path / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.usefixtures("whole")
@pytest.mark.parametrize("spec", METHODS)
def test_answers_do_not_depend_on_the_batch(answerer, tmp_path, spec):
    before = len(answerer.programs)
    _, alone, _ = run_stages(tmp_path / "alone", answerer, spec=spec)
    assert all((one.density < 0.9) == (spec != "dense") for one in alone[4:])
    between = len(answerer.programs)
    _, together, _ = run_stages(tmp_path / "together", answerer, spec=spec, batch_size=2)
    assert [one.batch for one in together] == [1, 2, 2, 2] * len(LENGTHS)
    assert [dataclasses.replace(one, batch=1) for one in together] == alone
    # A batch with a prompt too few, and one with longer answers, bring no programs of their own.
    # What is kept of a long prompt is decoded by the program of a short one.
    new = (between - before, len(answerer.programs) - between)
    assert new == ((0, 6) if spec == "dense" else (4, 4))


@pytest.mark.parametrize("chunk_size", [None, 128])
def test_visited_pairs_of_long_prompts_are_counted_while_they_are_read(
    answerer, model, tmp_path, monkeypatch, chunk_size
):
    """Prompts in chunks, and an index too large to keep."""
    spec = SPARSE if chunk_size is None else "dense"
    how = {"spec": spec, "lengths": (300,), "limit": 1}
    _, [want], _ = run_stages(tmp_path / "kept", answerer, **how)
    monkeypatch.setattr(answer, "_INDEX_BYTES", 0)
    counting = Answerer(model, chunk_size=chunk_size)
    _, [found], _ = run_stages(tmp_path / "counted", counting, **how)
    assert len(counting.programs) == 2  # reading and decoding
    assert dataclasses.replace(found, cache_bytes=want.cache_bytes) == want


def test_what_is_kept_of_a_prompt_takes_less_memory(answerer, tmp_path):
    _, [*_, kept], _ = run_stages(tmp_path, answerer, spec=SPARSE, limit=1)
    bytes_of = lambda tokens: 2 * 2 * tokens * 2 * 16 * 4  # keys, values; layers; heads; float32
    assert kept.cache_bytes == bytes_of(40 + 3)


def test_times_are_those_of_a_batch_over_its_prompts(answerer, tmp_path, monkeypatch):
    run_stages(tmp_path / "compiled", answerer, batch_size=2)
    ticks = itertools.accumulate(itertools.cycle([10, 6, 100, 9]))
    clock = lambda: float(next(ticks))
    monkeypatch.setattr(answer, "time", SimpleNamespace(perf_counter=clock))
    _, predictions, _ = run_stages(tmp_path / "timed", answerer, batch_size=2)
    times = {one.batch: (one.prefill_seconds, one.decode_seconds) for one in predictions}
    assert times == {2: (3, 4.5), 1: (6, 9)}


def test_what_is_there_is_not_made_again(whole, answerer, tmp_path):
    unbroken, (samples, answers, _) = whole
    shutil.copytree(unbroken, tmp_path, dirs_exist_ok=True)
    lines = read_lines(tmp_path / "predictions.jsonl")
    folder.replace_lines(tmp_path / "predictions.jsonl", [lines[0], lines[1] | {"answer": "kept"}])
    assert prepare(tmp_path, [d._replace(make=None) for d in drafts()]) == samples
    kept = dataclasses.replace(answers[1], answer="kept")
    assert run_stages(tmp_path, answerer)[1] == [answers[0], kept, *answers[2:]]


def test_answers_are_greedy_continuations_of_prompt_and_lead(whole, model):
    samples, answers, _ = whole[1]
    for sample, found in zip(samples, answers, strict=True):
        ids = model.tokenizer.encode(f"{sample.prompt} t7 t8")
        assert found.prompt_tokens == len(ids)
        tokens, new = np.zeros((1, LENGTHS[1] + 3), np.int32), sample.max_new_tokens
        for end in range(len(ids), len(ids) + new):
            tokens[0, :end] = ids
            logits = forward(
                model.params, jnp.asarray(tokens), config=model.config, attention_fn=DENSE,
                lengths=jnp.array([end]),
            )  # fmt: skip
            ids = [*ids, int(np.argmax(logits[0, end - 1]))]
        assert not set(ids[-new:]) & set(model.tokenizer.stop_tokens)
        assert found.answer == model.tokenizer.decode(ids[-new:])
        assert found.new_tokens == new


def test_a_limit_counts_samples_of_each_length_and_can_be_raised(whole, answerer, tmp_path):
    unbroken, (_, answers, _) = whole
    samples, some, _ = run_stages(tmp_path, answerer, limit=1)
    assert [sample.name for sample in samples] == ["40 0", "300 0"]
    assert some == [answers[0], answers[4]]
    assert run_stages(tmp_path, answerer)[1] == answers
    assert (tmp_path / "scores.jsonl").read_bytes() == (unbroken / "scores.jsonl").read_bytes()


def test_names_must_differ():
    with pytest.raises(ValueError, match="2 are called '40 0'"):
        limited([*drafts(), drafts()[0]], None)


def test_means_are_over_task_and_length():
    of = lambda task, length, value: Score(
        name="", task=task, length=length, score=value, density=value / 2,
        prefill_seconds=2 * value, decode_seconds=value + 1, cache_bytes=length,
    )  # fmt: skip
    found = means([of("a", 4, 1.0), of("a", 8, 0.5), of("b", 4, 0.25), of("a", 4, 0.0)])
    assert [tuple(mean) for mean in found] == [
        ("a", 4, 2, 0.5, 0.25, 1.0, 1.5, 4.0),
        ("a", 8, 1, 0.5, 0.25, 1.0, 1.5, 8.0),
        ("b", 4, 1, 0.25, 0.125, 0.5, 1.25, 4.0),
    ]


def test_the_table_has_a_column_for_each_method():
    score = Score(
        name="", task="a", length=4000, score=0.25, density=0.5, prefill_seconds=1.234,
        decode_seconds=0.5, cache_bytes=3 << 20,
    )  # fmt: skip
    other = dataclasses.replace(score, score=1.0, density=0.125)
    label = "minference+snapkv:1024"
    console = Console(width=60, file=io.StringIO())
    methods = {"dense": [score], label: [other], **{f"xattention:0.{n}": [score] for n in range(9)}}
    make_room(console, len(methods))
    console.print(table(methods, title=""))
    lines = console.file.getvalue().splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines]
    # Figures of nine more methods are whole, too.
    assert all(cell in ("25.0", "50.0", "1.23", "0.5", "3") for row in cells for cell in row[5:])
    cells = [row[:5] for row in cells]
    assert ["a", "4,000", "1", "25.0", "100.0"] in cells
    assert ["pairs visited, %", "4,000", "1", "50.0", "12.5"] in cells
    assert ["prefill, s", "4,000", "1", "1.23", "1.23"] in cells
    assert ["cache, MiB", "4,000", "1", "3", "3"] in cells
    heads = [[cell.strip() for cell in line.split("┃")[1:-1]] for line in lines]
    assert "".join(head[4] for head in heads if head) == label


def test_a_prompt_beyond_the_context_is_told(model):
    with pytest.raises(UserError, match="4998 tokens and up to 3"):
        predict.tokenise([question(40, 0), question(5000, 0)], model, chat=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(Evaluation):
    """A command with the samples of this file."""


@pytest.fixture
def loaded(answerer, monkeypatch):
    """Runs share a model and its programs."""
    for name in ("load", "sketch"):
        monkeypatch.setattr(begin, name, lambda *_: answerer.model)
    monkeypatch.setattr(run, "Answerer", lambda *_, **__: answerer)


def evaluate(output, make=drafts, **options):
    defaults = {"model": ModelOptions(model="tiny"), "methods": METHODS}
    config = Words(output=output, **{**defaults, **options})
    return run.evaluate(
        config, settings={"words": 1}, drafts=lambda _: make(), metric=length_of
    )  # fmt: skip


def contents(output):
    """All files of a run, without what names the moment and the folder."""
    files = [path for path in output.rglob("*") if path.is_file()]
    found: dict[str, Any] = {str(path.relative_to(output)): path.read_bytes() for path in files}
    for record in read_records(output / "record.jsonl"):
        found[record["result"]["method"]] = record["result"]
    return {name: value for name, value in found.items() if name != "record.jsonl"}


@pytest.mark.usefixtures("loaded")
def test_a_run_killed_anywhere_goes_on_without_loss(tmp_path, monkeypatch):
    evaluate(tmp_path / "whole", batch_size=2)
    wanted = contents(tmp_path / "whole")

    def dying(path, values, writes, left):
        values = list(values)
        append_lines(path, values)
        if next(writes) == 0:
            size = sum(len(json.dumps(value)) + 1 for value in values)
            path.write_bytes(path.read_bytes()[: -min(left, size)] if left else path.read_bytes())
            raise KeyboardInterrupt

    # Writes are 8 of samples and 6 of each method's batches; the last one is cut.
    for at, left in ((0, 0), (7, 1), (8, 500), (10, 150), (13, 0), (15, 1), (19, 500)):
        writes, output = itertools.count(-at), tmp_path / str(at)
        with monkeypatch.context() as patch:
            for module in (stages, predict):
                patch.setattr(module, "append_lines", lambda *x, w=writes, n=left: dying(*x, w, n))
            with pytest.raises(KeyboardInterrupt):
                evaluate(output, batch_size=2)
        evaluate(output, batch_size=2)
        assert contents(output) == wanted


@pytest.mark.usefixtures("loaded")
def test_a_method_can_be_added_to_a_run(answerer, tmp_path):
    for output, together in (("a", [METHODS]), ("b", [[method] for method in METHODS])):
        for methods in together:
            scores = evaluate(tmp_path / output, methods=methods)
            assert list(scores) == list(methods)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    records = read_records(tmp_path / "a" / "record.jsonl", kind="words")
    assert [record["result"]["method"] for record in records] == list(METHODS)
    dense, kept = (record["result"] for record in records)
    assert set(dense) == {"method", "patterns_sha256", "model_sha256", "means", "scores"}
    assert dense["model_sha256"] == kept["model_sha256"] == fingerprint(answerer.model)
    assert dense["scores"] == {one.name: one.score for one in evaluate(tmp_path / "a")["dense"]}
    assert [mean["samples"] for mean in dense["means"]] == [4, 4]
    assert dense["means"][1]["cache_bytes"] > kept["means"][1]["cache_bytes"]
    # Once all is there, no sample is made and no prompt is read.
    again = evaluate(tmp_path / "a", make=lambda: [d._replace(make=None) for d in drafts()])
    assert list(again) == list(METHODS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"methods": ("spiral",)}, "'spiral' is no method"),
        ({"methods": ()}, "at least one method"),
        ({"methods": ("patterns:none.json",)}, "no pattern file at none.json"),
        ({"methods": ("threshold:0.1", "threshold:.10")}, "threshold:0.1 twice"),
        ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
        (
            {"model": ModelOptions(model="tiny", chunk_size=8)},
            r"needs the whole prompt at once; leave out --chunk-size or \+streaming:4,36",
        ),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(begin, "sketch", None)
    with pytest.raises(UserError, match=words):
        evaluate(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []


def too_short():
    raise UserError("the text has only 3 tokens")


@pytest.mark.parametrize(
    ("layers", "samples", "words"),
    [
        (2, drafts((40, 5000)), "5000 tokens do not fit the model's context of 1024; .*yarn:5"),
        (3, drafts(), "describes 3 layers of 4 heads, but the model has 2"),
        (2, [*drafts(), Draft("x", "words", 300, too_short)], "the text has only 3 tokens"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_are_read(
    tmp_path, monkeypatch, model, layers, samples, words
):
    path = tmp_path / "heads.json"
    parse_method("a_shape:2,8").attention(layers, 4).patterns.save(path)
    monkeypatch.setattr(begin, "sketch", lambda _: model)
    monkeypatch.setattr(begin, "load", None)
    with pytest.raises(UserError, match=words):
        evaluate(tmp_path / "run", make=lambda: samples, methods=(f"patterns:{path}",))
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_model_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="`tiny` does not exist"):
        evaluate(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("loaded")
def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "dense").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*dense"):
        evaluate(tmp_path)


def test_a_method_from_a_changed_file_is_another(tmp_path):
    path = tmp_path / "heads.json"
    made = []
    for spec in ("a_shape:2,8", "a_shape:2,9"):
        parse_method(spec).attention(2, 4).patterns.save(path)
        made.append(parse_method(f"patterns:{path}"))
    folders = folder.claim_methods(tmp_path, made[:1])
    assert folders == {"patterns:heads.json": tmp_path / "patterns-heads.json"}
    append_lines(tmp_path / "patterns-heads.json" / "predictions.jsonl", [{}])
    folder.claim_methods(tmp_path, made[:1])
    with pytest.raises(UserError, match="made with patterns_sha256"):
        folder.claim_methods(tmp_path, made[1:])


def test_only_a_line_without_its_end_is_removed(tmp_path):
    path = tmp_path / "lines.jsonl"
    append_lines(path, [{"a": "é\u2028"}, {"a": 2}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"a": 3}')
    assert read_lines(path) == [{"a": "é\u2028"}, {"a": 2}]
    assert path.read_bytes() == whole
    path.write_bytes(b'{"a"\n' + whole)
    with pytest.raises(UserError, match="damaged"):
        read_lines(path)


def test_a_folder_with_lines_belongs_to_one_setting(tmp_path):
    claim(tmp_path, {"seed": 1, "lengths": (1, 2)})
    claim(tmp_path, {"seed": 0, "lengths": (1, 2)})
    append_lines(tmp_path / "samples.jsonl", [{}])
    claim(tmp_path, {"seed": 0, "lengths": (1, 2), "model": "m"})
    with pytest.raises(UserError, match="made with model = m, this one has n"):
        claim(tmp_path, {"seed": 0, "model": "n"})
    assert json.loads((tmp_path / "settings.json").read_text())["lengths"] == [1, 2]


def test_a_record_keeps_what_an_earlier_part_of_the_run_used(tmp_path, monkeypatch):
    claim(tmp_path, {"model_sha256": "m"})
    for used in ({"attention": ["xla"]}, {}, {"attention": ["mosaic"], "scores": ["xla"]}):
        monkeypatch.setattr(records, "used_implementations", lambda found=used: found)
        config = Words(model=ModelOptions(model="tiny"))
        folder.write_record(tmp_path, parse_method("dense"), kind="w", config=config, result={})
    [kept] = read_records(tmp_path / "record.jsonl")
    wanted = {"attention": ["mosaic", "xla"], "scores": ["xla"]}
    assert kept["environment"]["implementations"] == wanted


def test_what_is_compiled_first_is_what_runs(answerer):
    """Also where lists are counted and a part of the prompt is kept."""
    method = parse_method("a_shape:16,64+streaming:4,60")
    attention, compression = method.attention(2, 4), method.compression(2)
    own = Answerer(answerer.model, chunk_size=None)
    tokens = np.arange(300, dtype=np.int32).reshape(2, 150) % 50
    batch = answer.Batch(tokens, np.array([150, 120], np.int32), 5, 6, 150)
    own.compile(batch, attention, compression)
    assert len(own.programs) == 3
    found = own(batch, attention, compression)
    assert len(own.programs) == 3
    assert found.tokens == answerer(batch, attention, compression).tokens
