"""`minference scbench`: what is asked, how turns are read, what a kill leaves, what is refused."""

import dataclasses
import io
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from experiments.__main__ import main
from experiments.common.errors import UserError
from experiments.common.programs import Programs
from experiments.common.record import read_records
from experiments.evaluation.folder import read_lines, replace_lines
from experiments.evaluation.stages import Score
from experiments.scbench.pieces import Turn, cut
from experiments.scbench.predict import predict
from experiments.scbench.reader import Reader, Sizes, read_first, read_onto
from experiments.scbench.report import Groups, make_room, turn_table
from experiments.scbench.samples import drafts
from minference_jax import DenseAttention
from minference_jax.kv_cache import StreamingKV
from models import load_model
from models.common.decoder import forward
from models.common.tokenizer import Tokenizer
from tests.experiments.test_infinitebench import byte_tokenizer
from tests.experiments.test_needle import BOOK

TURNS = [Turn("How?", " So:", "a"), Turn("Why?", " For:", "b"), Turn("Who?", "", "c")]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MODES = ("multi_turn", "shared_context")


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(
        tiny_model, dtype=jnp.float32, rope_scaling={"rope_type": "linear", "factor": 8.0}
    )


@dataclasses.dataclass(frozen=True)
class WithTokenizer:
    tokenizer: Tokenizer


def texts(mode, *, template=None, chat=True):
    tokenizer = dataclasses.replace(byte_tokenizer(), chat_template=template)
    found = cut(WithTokenizer(tokenizer), "Long text.\n\n", TURNS, mode=mode, chat=chat)
    return [tokenizer.decode(piece) for piece in found]


@pytest.mark.usefixtures("as_users_see_it")
def test_a_conversation_is_cut_where_the_model_answers():
    assert texts("multi_turn") == [
        "Long text.\n\nHow? So:", " a\n\nWhy? For:", " b\n\nWho?",
    ]  # fmt: skip
    assert texts("multi_turn", template=TEMPLATE) == [
        "<user>Long text.\n\nHow?</>\n<assistant>So:",
        " a</>\n<user>Why?</>\n<assistant>For:",
        " b</>\n<user>Who?</>\n<assistant>",
    ]
    assert texts("multi_turn", template=TEMPLATE, chat=False) == texts("multi_turn")
    assert texts("shared_context") == ["Long text.\n\n", "How? So:", "Why? For:", "Who?"]
    assert texts("shared_context", template=TEMPLATE) == [
        "<user>Long text.\n\n", "How?</>\n<assistant>So:", "Why?</>\n<assistant>For:",
        "Who?</>\n<assistant>",
    ]  # fmt: skip


@pytest.mark.usefixtures("as_users_see_it")
def test_a_template_that_rewrites_what_was_said_is_told():
    for template in ("{{ messages | length }}" + TEMPLATE, "{{ messages[-1].content | upper }}"):
        with pytest.raises(UserError, match=r"changes earlier turns.*--no-chat"):
            texts("multi_turn", template=template)


def conversations(model, task, *, samples=2, turns=3, seed=0, length=400):
    made = [
        draft.make()
        for draft in drafts(
            model, tasks=[task], lengths=[length], samples=samples, turns=turns, text=BOOK,
            seed=seed, chat=True,
        )
    ]  # fmt: skip
    return [made[at : at + turns + 1] for at in range(0, len(made), turns + 1)]


def test_each_turn_asks_for_something_of_the_context(model):
    for context, *turns in conversations(model, "retr_kv", samples=3):
        table = json.loads(re.search(r"\{.*\}", context.prompt)[0])
        keys = [re.search(r'key "(.*)"', turn.prompt)[1] for turn in turns]
        assert [turn.answers for turn in turns] == [(table[key],) for key in keys]
        assert len(set(keys)) == 3
    for context, *turns in conversations(model, "needles", samples=3):
        hidden = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", context.prompt))
        keys = [re.search(r"number for (\S+) mentioned", turn.prompt)[1] for turn in turns]
        assert [turn.answers for turn in turns] == [(hidden[key],) for key in keys]
        assert len(hidden) == len(set(keys)) == 3
    assert [one.task for one in (context, *turns)] == [
        "needles, context", "needles, turn 1", "needles, turn 2", "needles, turn 3",
    ]  # fmt: skip


@pytest.mark.parametrize("task", ["retr_kv", "needles"])
def test_a_conversation_has_the_length_and_the_seed_decides(model, task):
    first, second = conversations(model, task)
    for context, *turns in (first, second):
        asked = [Turn(turn.prompt, turn.lead, turn.answers[0]) for turn in turns]
        read = sum(map(len, cut(model, context.prompt, asked, mode="multi_turn", chat=True)))
        assert 390 <= read + turns[0].max_new_tokens <= 400
    assert conversations(model, task) == [first, second]
    assert first[0].prompt != second[0].prompt
    assert conversations(model, task, seed=1)[0][0].prompt != first[0].prompt


def words(sample, number, length):
    rng = np.random.default_rng([number, length])
    text = " ".join(f"t{word}" for word in rng.integers(3, 60, length))
    return dataclasses.replace(sample, prompt=text + " ", lead=" t5 t6", answers=("t9 t8",))


@pytest.fixture(scope="module")
def asked(model):
    """Two conversations of two turns in the model's own words, with answers of three tokens."""
    made = conversations(model, "needles", turns=2, length=300)
    return [
        [
            dataclasses.replace(words(sample, 3 * i + j, 5 + 20 * (j == 0) + i), max_new_tokens=3)
            for j, sample in enumerate(one)
        ]
        for i, one in enumerate(made)
    ]


class Noting(Programs):
    """Programs that note how many there are when one of them is about to run."""

    def __init__(self):
        super().__init__()
        self.known = []

    def ready(self, program):
        self.known.append(len(self))
        return super().ready(program)


def reader(model, compression=None, **programs):
    return Reader(
        model=model,
        attention=lambda length: DenseAttention(),
        compression=compression,
        chat=True,
        chunk_size=None,
        **programs,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, asked):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("scbench")
    for mode in MODES:
        predict(folder / mode, asked, reader(model), mode=mode, name="dense")
    return folder


def history(one, turn, mode):
    context, *turns = one
    before = turns[:turn] if mode == "multi_turn" else []
    said = "".join(f"{x.prompt}{x.lead} {x.answers[0]}\n\n" for x in before)
    return f"{context.prompt}{said}{turns[turn].prompt}{turns[turn].lead}"


def next_token(model, ids):
    tokens = np.zeros((1, 90), np.int32)
    tokens[0, : len(ids)] = ids
    logits = forward(
        model.params, jnp.asarray(tokens), config=model.config, attention_fn=DenseAttention(),
        lengths=jnp.array([len(ids)]),
    )  # fmt: skip
    return int(np.argmax(logits[0, len(ids) - 1]))


@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_to_all_that_was_said_before(whole, model, asked, mode):
    lines = {line["name"]: line for line in read_lines(whole / mode / "predictions.jsonl")}
    for one in asked:
        for turn in (0, 1):
            line = lines[one[1 + turn].name]
            ids = model.tokenizer.encode(history(one, turn, mode))
            assert line["prompt_tokens"] == len(ids)
            assert line["density"] == 1
            for _ in range(3):
                ids = [*ids, next_token(model, ids)]
            assert line["answer"] == model.tokenizer.decode(ids[-3:])


def untimed(folder):
    lines = read_lines(folder / "predictions.jsonl")
    return [{name: line[name] for name in line if "seconds" not in name} for line in lines]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.1, 0.4, 0.6, 0.999])
def test_a_killed_run_ends_with_the_file_of_an_unbroken_one(
    whole, model, asked, tmp_path, mode, share
):
    content = (whole / mode / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(content[: int(share * len(content))])
    predict(tmp_path, asked, reader(model), mode=mode, name="dense")
    assert untimed(tmp_path) == untimed(whole / mode)


def test_all_is_compiled_before_anything_runs(model, asked, tmp_path):
    """Also for a task whose answers have another length."""
    longer = [dataclasses.replace(one, max_new_tokens=4) for one in asked[1]]
    programs = Noting()
    own = reader(model, programs=programs)
    predict(tmp_path, [asked[0], longer], own, mode="multi_turn", name="dense")
    assert set(programs.known) == {4}  # first pieces, later ones, two lengths of answers


@pytest.mark.usefixtures("as_users_see_it")
def test_what_is_there_is_not_answered_again(whole, asked):
    for mode in MODES:
        found = predict(whole / mode, asked, reader(None), mode=mode, name="dense")
        assert [one.name for one in found] == [turn.name for _, *turns in asked for turn in turns]


def test_a_compression_is_of_what_isread_first(model):
    few = reader(model, StreamingKV(1, 2))
    sizes = Sizes(length=100, first=64, later=64, capacity=80)
    state = read_first(range(3, 40), few, sizes)
    assert state.cache.stored.tolist() == [[3], [3]]
    state = read_onto(state, range(3, 14), few, sizes)
    assert state.cache.stored.tolist() == [[3 + 11], [3 + 11]]
    assert state.cache.lengths.tolist() == [state.tokens] == [37 + 11]


def test_turns_are_scored_apart_and_drawn(tiny_model, tmp_path, capsys):
    folder, book = tmp_path / "run", tmp_path / "book.txt"
    book.write_text(BOOK)
    argv = ["scbench", "--model", tiny_model, "--rope-scaling", "linear:8", "--text", str(book)]
    argv += ["--lengths", "300", "--turns", "2", "--samples", "2", "--tasks", "needles"]
    argv += ["--methods", "dense", "--output", str(folder), "--modes", "multi_turn"]
    assert main([*argv, "--limit", "1"]) == 0
    assert len(read_lines(folder / "samples.jsonl")) == 3
    # Second turns are answered rightly when they follow first ones.
    assert main(argv) == 0
    samples = {line["name"]: line for line in read_lines(folder / "samples.jsonl")}
    path = folder / "dense" / "multi_turn" / "predictions.jsonl"
    right = lambda name: f"It is {samples[name]['answers'][0]}." if "turn 2" in name else "No."
    replace_lines(path, [line | {"answer": right(line["name"])} for line in read_lines(path)])
    capsys.readouterr()
    assert main(argv) == 0
    [record] = read_records(folder / "record.jsonl", kind="scbench")
    modes = record["result"]["modes"]
    means = [
        (mean["task"], mean["samples"], mean["score"]) for mean in modes["multi_turn"]["means"]
    ]
    assert means == [("needles, turn 1", 2, 0), ("needles, turn 2", 2, 1)]
    assert "50.0" in capsys.readouterr().out
    pixels = imread(folder / "scbench.png")[..., :3]
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert main([*argv, "--turns", "3"]) == 2
    assert "made with turns = 2, this one has 3" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_task_and_length(capsys):
    groups = Groups(tasks=["needles"], lengths=[8, 16], turns=2)
    of = lambda turn, length, score: Score(
        name="",
        task=f"needles, turn {turn}",
        length=length,
        score=score,
        density=score / 2,
        prefill_seconds=1.0,
        decode_seconds=1.0,
        cache_bytes=2 << 20,
    )
    scores = [of(1, 8, 1.0), of(1, 8, 0.5), of(2, 8, 0.25), of(1, 16, 0.0), of(2, 16, 1.0)]
    table = turn_table(scores, groups, title="")
    make_room(console := Console(width=20, file=io.StringIO()), groups)
    assert console.measure(table).maximum <= console.width
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows == [
        ("needles", "8", "75.0", "25.0", "50.0", "12.5%", "2 MiB"),
        ("needles", "16", "0.0", "100.0", "50.0", "50.0%", "2 MiB"),
    ]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        pytest.param(
            ["--tasks", "retr_kv", "--text", "a"], "belongs to --tasks needles", id="text"
        ),
        pytest.param(["--text", "none.txt"], "none.txt", id="no-text"),
        pytest.param(["--tasks", "novel"], "novel", id="unknown"),
        pytest.param(["--lengths", "200"], "at least 300, got 200", id="length"),
        pytest.param(["--lengths", "900", "900"], "--lengths names 900 twice", id="twice"),
        pytest.param(
            ["--modes", "multi_turn", "multi_turn"], "--modes names multi_turn twice", id="modes"
        ),
        pytest.param(["--batch-size", "2"], "one at a time; leave out --batch-size 2", id="batch"),
        pytest.param(["--turns", "0"], "at least 1, got 0", id="turns"),
        pytest.param(["--samples", "0"], "at least 1, got 0", id="samples"),
        pytest.param(["--methods", "inf_llm:256"], "cannot read questions onto a", id="onto"),
        pytest.param(
            ["--methods", "dense+snapkv:64", "--chunk-size", "8"],
            "leave out --chunk-size",
            id="chunks",
        ),
    ],
)
def test_what_cannot_work_is_told_before_a_model_is_loaded(
    capsys, tmp_path, monkeypatch, argv, words
):
    monkeypatch.chdir(tmp_path)
    assert main(["scbench", "--model", "missing", *argv]) == 2
    assert words in capsys.readouterr().err


def test_context_and_text_must_be_long_enough(tiny_model, capsys, tmp_path):
    argv = ["scbench", "--model", tiny_model, "--output", str(tmp_path)]
    assert main([*argv, "--lengths", "100000"]) == 2
    assert "100000 tokens do not fit the model's context" in capsys.readouterr().err
    short = tmp_path / "short.txt"
    short.write_text("t3 t4.")
    argv += ["--rope-scaling", "linear:8", "--tasks", "needles", "--text", str(short)]
    assert main([*argv, "--lengths", "500"]) == 2
    error = capsys.readouterr().err
    assert "needles of 500 tokens cannot be made" in error
    assert "name a longer one with --text" in error
