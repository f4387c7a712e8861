"""`minference compare`: its figures against numpy, and the programs that it compiles."""

import dataclasses
from collections import Counter

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.capacities import share_capacities
from experiments.common.methods import parse_method
from experiments.common.programs import Programs
from experiments.compare import measure, programs
from experiments.compare.measure import Subject
from experiments.compare.prompts import Reading
from models import load_model
from models.common.decoder import forward

LENGTH, ANSWER, POSITIONS = 500, 3, 300
SPARSE = "xattention:0"  # the first block and the query tile's own
SCALING = {"rope_type": "dynamic", "factor": 8.0}


def attention_of(spec):
    return parse_method(spec).attention(2, 4)


@pytest.fixture(scope="module")
def subject(tiny_model):
    """A prompt of a few tokens less than the length that it is padded to."""
    model = load_model(tiny_model, dtype=jnp.float32, rope_scaling=SCALING)
    ids = np.random.default_rng(1).integers(3, 60, LENGTH + ANSWER).tolist()
    tokens, answer = ids[:LENGTH], ids[LENGTH:]
    reading = Reading(name="a", task="needle", tokens=tokens, answer=answer, length=LENGTH + 21)
    return Subject(model=model, reading=reading, positions=POSITIONS, answer_room=ANSWER + 2)


def changed(subject, **fields):
    """The subject with another reading."""
    return dataclasses.replace(subject, reading=dataclasses.replace(subject.reading, **fields))


def measured_by(subject, *specs):
    """Figures of methods."""
    dense = measure.read(subject, attention_of("dense"))
    return {
        spec: measure.figures(subject, measure.read(subject, attention_of(spec)), dense.hidden)
        for spec in specs
    }


@pytest.fixture(scope="module")
def measured(subject):
    """Figures of dense attention and of a method."""
    return measured_by(subject, "dense", SPARSE)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def distributions(subject, spec, tokens):
    """Log probabilities of the next token everywhere, rotated as prompt and answer are."""
    logits = forward(
        subject.model.params,
        jnp.asarray([tokens]),
        config=subject.model.config,
        attention_fn=attention_of(spec),
        rope_length=jnp.array([LENGTH + ANSWER]),
    )
    return log_softmax(logits[0])


def test_figures_are_those_of_whole_distributions(subject, measured):
    tokens, answer = subject.reading.tokens, subject.reading.answer
    dense = distributions(subject, "dense", [*tokens, *answer])[:LENGTH]
    other = distributions(subject, SPARSE, tokens)
    kl = np.sum(np.exp(dense) * (dense - other), axis=1)[-POSITIONS:]
    assert kl.mean() > 1e-4
    result = measured[SPARSE]
    np.testing.assert_allclose(result["kl"], kl.mean(), rtol=1e-3)
    np.testing.assert_allclose(result["kl_of_next_token"], kl[-1], rtol=1e-3)
    agrees = (dense.argmax(axis=1) == other.argmax(axis=1))[-POSITIONS:]
    assert result["top1"] == agrees.mean() < 1
    for spec, found in (("dense", dense), (SPARSE, other)):
        own = found[np.arange(LENGTH - POSITIONS, LENGTH - 1), tokens[-POSITIONS + 1 :]]
        np.testing.assert_allclose(measured[spec]["perplexity"], np.exp(-own.mean()), rtol=1e-5)


def test_dense_is_as_far_from_itself_as_can_be_expected(measured):
    result = measured["dense"]
    assert (result["kl"], result["top1"], result["executed"], result["visited"]) == (0, 1, 1, 1)


def test_shares_are_those_of_the_masks(subject, measured):
    attention = attention_of(SPARSE)

    def observe(attention, q, k, v, **where):
        out, index = attention.attend(q, k, v, **where)
        return out, index.to_mask(LENGTH, LENGTH)[0]

    tokens = jnp.asarray([subject.reading.tokens])
    *_, masks = subject.model.prefill(
        tokens, attention_fn=attention, observe=observe, rope_length=jnp.array([LENGTH + ANSWER])
    )
    masks = np.asarray(masks)
    visited = masks.sum(axis=(2, 3)) / (LENGTH * (LENGTH + 1) / 2)
    tiles = np.pad(masks, ((0, 0), (0, 0), (0, 12), (0, 12))).reshape(2, 4, 4, 128, 4, 128)
    executed = tiles.any(axis=(3, 5)).sum(axis=(2, 3)) / 10
    assert np.all(executed == 0.7)  # 1 + 2 + 2 + 2 of 10
    result = measured[SPARSE]
    np.testing.assert_allclose(result["executed_by_head"], executed, atol=1e-3)
    np.testing.assert_allclose(result["visited"], np.mean(visited), rtol=1e-5)
    np.testing.assert_allclose(result["executed"], np.mean(executed), rtol=1e-5)


def test_what_a_baseline_counts_itself_is_told(subject):
    [result] = measured_by(subject, "streaming_dilated:8,510").values()
    row, key = np.mgrid[:LENGTH, :LENGTH]
    visited = (key <= row) & ((key < 8) | ((row - key) % 2 == 0))
    np.testing.assert_allclose(result["visited"], visited.sum() / np.sum(key <= row), rtol=1e-5)
    assert result["visited"] < result["executed"]


def test_the_answer_is_that_of_teacher_forcing(subject, measured):
    tokens, answer = subject.reading.tokens, subject.reading.answer
    found = distributions(subject, "dense", [*tokens, *answer])[LENGTH - 1 : -1]
    probability = np.exp(found[np.arange(ANSWER), answer].sum())
    np.testing.assert_allclose(measured["dense"]["answer_probability"], probability, rtol=1e-4)
    assert measured["dense"]["answer_right"] is False
    assert measured[SPARSE]["answer_probability"] != pytest.approx(probability, rel=1e-3)


def test_a_right_answer_is_one_that_greedy_decoding_gives(subject):
    tokens, answer = subject.reading.tokens, [0] * ANSWER
    for number in range(ANSWER):
        found = distributions(subject, "dense", [*tokens, *answer])
        answer[number] = int(found[LENGTH - 1 + number].argmax())
    for said, right in ((answer, True), ([*answer[:-1], answer[-1] ^ 1], False)):
        asked = changed(subject, answer=said)
        assert measured_by(asked, "dense")["dense"]["answer_right"] is right


def test_a_prompt_shorter_than_the_positions_is_compared_whole(subject, measured):
    short = changed(subject, tokens=subject.reading.tokens[:200], answer=[])
    result = measured_by(short, "dense")["dense"]
    assert result["positions"] == 200
    tokens = short.reading.tokens
    logits = forward(
        subject.model.params, jnp.asarray([tokens]), config=subject.model.config,
        attention_fn=attention_of("dense"),
    )  # fmt: skip
    own = log_softmax(logits[0])[np.arange(199), tokens[1:]]
    np.testing.assert_allclose(result["perplexity"], np.exp(-own.mean()), rtol=1e-5)


@pytest.fixture(scope="module")
def unpadded(subject):
    """Figures of prompts without padding, and how often each program was compiled for them."""
    found = Counter()

    def listen(event, _, fun_name="", **__):
        if event == "/jax/core/compile/backend_compile_duration":
            found[fun_name] += 1

    methods = ("dense", SPARSE, "xattention:0.5")
    own = Programs()
    plain = dataclasses.replace(changed(subject, length=LENGTH), answer_room=ANSWER, programs=own)
    short = changed(plain, tokens=subject.reading.tokens[:-9], answer=[5])
    work = [(prompt, attention_of(spec)) for prompt in (plain, short) for spec in methods]
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        programs.compile_all(work)
        number = len(own)
        before = Counter(found)
        results = [measured_by(prompt, *methods) for prompt in (plain, short)]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(own) == number
    return results[0], number, before, found


def test_padding_of_prompt_and_answer_changes_nothing(unpadded, measured):
    for spec, padded in measured.items():
        plain = unpadded[0][spec]
        assert plain.keys() == padded.keys()
        for name in plain.keys() - {"prefill_seconds"}:
            np.testing.assert_allclose(padded[name], plain[name], rtol=1e-5, atol=1e-9)


def test_programs_are_compiled_once_for_a_structure_before_all_measuring(unpadded):
    """Two structures, three methods, two prompts, each of which is read and counted."""
    _, number, before, after = unpadded
    assert number == 2 * 2 + 2
    names = [f"jit({name})" for name in ("run_read", "count_work", "force_answer")]
    assert [before[name] for name in names] == [2, 2, 1]
    # Distances may be there already: another test compares as many positions.
    assert before["jit(score_positions)"] <= 1
    for name in (*names, "jit(score_positions)"):
        assert after[name] == before[name]


def test_methods_share_structures():
    few = ("a_shape:8,64", "vertical_slash:60,100", "block_sparse:2", "block_sparse:40")
    few += ("hybrid:0.9,20", "hybrid:0.5,50", "threshold:0.5", "dense")
    shared = share_capacities([attention_of(spec) for spec in few])
    structures = [str(jax.tree.structure(attention)) for attention in shared]
    assert [structures.index(one) for one in structures] == [0, 0, 2, 2, 4, 4, 6, 7]


@pytest.mark.parametrize(("spec", "wider"), [("vertical_slash:60,101", "a_shape:99,1"),
                                             ("hybrid:1,20", "hybrid:1,99")])  # fmt: skip
def test_shared_capacities_change_nothing(spec, wider):
    own = dataclasses.replace(attention_of(spec), dense_above=None)
    shared, _ = share_capacities([own, attention_of(wider)])
    assert str(jax.tree.structure(own)) != str(jax.tree.structure(shared))
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 1500, n, 8)), jnp.float32) for n in (4, 2, 2))

    estimate = jax.jit(lambda attention: attention.layer(0).attend(q, k, v)[1])
    narrow, wide = estimate(own), estimate(shared)
    assert np.all(narrow.density(1500, 1500) < 0.9)
    room = narrow.columns.shape[2]
    assert np.all(narrow.column_count > 0)
    assert room < wide.columns.shape[2]
    cut = dataclasses.replace(wide, columns=wide.columns[:, :, :room])
    jax.tree.map(np.testing.assert_array_equal, cut, narrow)
