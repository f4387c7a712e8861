"""Patterns, their arrays and their files."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import minference_jax as mj
from minference_jax.files import save_original

ORIGINALS = Path(__file__).parents[2].parent / "shared" / "data" / "minference_configs"

GRID = [
    [mj.Dense(), mj.AShape(sink_size=4, window_size=64)],
    [mj.VerticalSlash(vertical_size=30, slash_size=800), mj.BlockSparse(num_blocks=100)],
    [mj.TriShape(sink_size=8, window_size=512, last_size=128), mj.Dense()],
]


def test_grid_round_trips_through_arrays_and_file(tmp_path):
    patterns = mj.HeadPatterns.from_grid(GRID)
    assert patterns.grid() == GRID
    assert (patterns.num_layers, patterns.num_heads) == (3, 2)
    assert patterns.pattern(1, 0) == GRID[1][0]
    patterns.save(tmp_path / "patterns.json")
    again = mj.HeadPatterns.load(tmp_path / "patterns.json")
    assert again.grid() == GRID
    assert jax.tree.structure(again) == jax.tree.structure(patterns)


def test_original_file_means_what_minference_executes(tmp_path):
    path = tmp_path / "best_pattern.json"
    path.write_text(
        json.dumps(
            [
                {"0": ["vertical_and_slash", 10, 20, 0.9], "2": ["stream_llm", 100, 800, 1.0]},
                {"0": ["block_sparse", 7, 9, 5], "1": ["vertical_and_slash", 3500, 100, 12]},
            ]
        )
    )
    default = mj.VerticalSlash(vertical_size=1000, slash_size=6096)
    assert mj.HeadPatterns.load(path).grid() == [
        [
            mj.VerticalSlash(vertical_size=30, slash_size=50),
            default,
            mj.AShape(sink_size=100, window_size=800),
        ],
        [
            mj.BlockSparse(num_blocks=100),
            mj.VerticalSlash(vertical_size=3500, slash_size=100),
            default,
        ],
    ]


@pytest.mark.skipif(not ORIGINALS.is_dir(), reason="MInference's pattern files are not here")
def test_every_original_file_loads_entry_by_entry():
    paths = sorted(ORIGINALS.glob("*.json"))
    assert len(paths) == 14
    for path in paths:
        content = json.loads(path.read_text())
        patterns = mj.HeadPatterns.load(path)
        assert patterns.num_layers == len(content)
        assert patterns.num_heads == len(content[0])
        grid = patterns.grid()
        for layer, heads in enumerate(content):
            for head, (name, first, second, _) in heads.items():
                got = grid[layer][int(head)]
                if name == "vertical_and_slash":
                    assert (got.vertical_size, got.slash_size) == (first, second)
                else:
                    assert got == mj.AShape(sink_size=first, window_size=second)


def test_original_files_are_written_as_they_are_read(tmp_path):
    grid = [
        [mj.VerticalSlash(vertical_size=3500, slash_size=100), mj.BlockSparse(num_blocks=100)],
        [
            mj.AShape(sink_size=100, window_size=800),
            mj.VerticalSlash(vertical_size=1, slash_size=9),
        ],
    ]
    path = tmp_path / "best_pattern.json"
    scores = np.array([[0.25, 1.0], [0.5, 0.0]])
    save_original(mj.HeadPatterns.from_grid(grid), path, scores=scores)
    # The last head is raised to what MInference runs at least.
    least = mj.VerticalSlash(vertical_size=30, slash_size=50)
    assert mj.HeadPatterns.load(path).grid() == [grid[0], [grid[1][0], least]]
    content = json.loads(path.read_text())
    assert content[0]["0"] == ["vertical_and_slash", 3500, 100, 0.25]
    assert content[1]["1"] == ["vertical_and_slash", 30, 50, 0.0]


@pytest.mark.parametrize(
    "pattern",
    [
        mj.Dense(),
        mj.TriShape(sink_size=1, window_size=1, last_size=1),
        mj.BlockSparse(num_blocks=99),
        mj.VerticalSlash(vertical_size=30, slash_size=50, window_size=30),
    ],
    ids=lambda pattern: type(pattern).__name__,
)
def test_original_files_refuse_what_they_cannot_hold(pattern, tmp_path):
    patterns = mj.HeadPatterns.from_grid([[pattern]])
    with pytest.raises(ValueError, match="cannot hold " + type(pattern).__name__):
        save_original(patterns, tmp_path / "out.json", scores=np.zeros((1, 1)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param("{", "not a JSON file", id="not-json"),
        pytest.param("{}", "neither a pattern file", id="no-format"),
        pytest.param("[]", "one non-empty object", id="empty-list"),
        pytest.param('[{"a": []}]', "head numbers", id="head-name"),
        pytest.param('[{"0": ["spiral", 1, 2, 0]}]', "unknown pattern 'spiral'", id="unknown"),
        pytest.param('[{"0": ["stream_llm", -1, 2, 0]}]', "non-negative", id="negative"),
        pytest.param('[{"0": ["stream_llm"]}]', "expected \\[pattern", id="short-entry"),
        pytest.param(
            '{"format": "minference_jax.head_patterns", "version": 9}', "version 9", id="version"
        ),
        pytest.param(
            '{"format": "minference_jax.head_patterns", "version": 1, "layers": [[0]],'
            ' "patterns": [{"kind": "a_shape", "sink_size": 1}]}',
            "window_size", id="missing-size",
        ),
        pytest.param(
            '{"format": "minference_jax.head_patterns", "version": 1, "layers": [[1]],'
            ' "patterns": [{"kind": "dense"}]}',
            "outside 0..0", id="table-index",
        ),
    ],
)  # fmt: skip
def test_bad_files_say_what_is_wrong(tmp_path, content, message):
    path = tmp_path / "patterns.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        mj.HeadPatterns.load(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        mj.HeadPatterns.load(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: mj.VerticalSlash(vertical_size=-1, slash_size=5), id="vertical"),
        pytest.param(lambda: mj.VerticalSlash(vertical_size=1, slash_size=0), id="slash"),
        pytest.param(lambda: mj.AShape(sink_size=0, window_size=0), id="window"),
        pytest.param(lambda: mj.AShape(sink_size=-3, window_size=9), id="sink"),
        pytest.param(lambda: mj.BlockSparse(num_blocks=0), id="blocks"),
        pytest.param(
            lambda: mj.TriShape(sink_size=0, window_size=1, last_size=-1), id="last"
        ),
        pytest.param(lambda: mj.HeadPatterns.from_grid([]), id="no-layers"),
        pytest.param(
            lambda: mj.HeadPatterns.from_grid([[mj.Dense()], [mj.Dense()] * 2]), id="ragged"
        ),
        pytest.param(
            lambda: mj.HeadPatterns.from_grid([[mj.BlockSparse(num_blocks=9)]], max_blocks=8),
            id="capacity",
        ),
    ],
)  # fmt: skip
def test_impossible_patterns_are_refused(make):
    with pytest.raises(ValueError, match=r"must|has|needs"):
        make()


def test_capacities_leave_room_and_are_the_only_static_part():
    small = mj.HeadPatterns.from_grid([[mj.VerticalSlash(vertical_size=700, slash_size=5)]])
    large = mj.HeadPatterns.from_grid([[mj.VerticalSlash(vertical_size=1000, slash_size=99)]])
    assert small.max_columns == large.max_columns == 1024
    assert jax.tree.structure(small) == jax.tree.structure(large)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(small))
    assert np.asarray(large.slash_size).tolist() == [[99]]
