"""Pattern files that come with the package."""

import re
from pathlib import Path

import pytest

import minference_jax as mj
from minference_jax import configs
from minference_jax.files import attention_size


def test_files_of_a_folder_are_listed_and_read_by_name(tmp_path):
    pattern = mj.VerticalSlash(vertical_size=30, slash_size=800)
    for name, heads in (("small-0.5b", 2), ("large", 3)):
        patterns = mj.HeadPatterns.uniform(pattern, num_layers=1, num_heads=heads)
        patterns.save(tmp_path / f"{name}.json")
    (tmp_path / "README.md").write_text("")
    assert mj.shipped_patterns(folder=tmp_path) == ["large", "small-0.5b"]
    assert mj.load_shipped("small-0.5b", folder=tmp_path).patterns.grid() == [[pattern] * 2]
    for unknown in ("small", "../large", "README"):
        with pytest.raises(ValueError, match=r"it has: large, small-0\.5b$"):
            mj.load_shipped(unknown, folder=tmp_path)
    with pytest.raises(ValueError, match="it has: none"):
        mj.load_shipped("large", folder=tmp_path / "nothing")


def test_the_readme_names_what_is_shipped_and_all_of_it_can_be_read():
    readme = (Path(configs.__file__).parent / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"^\| `([^`]+)` \|", readme, flags=re.MULTILINE)
    assert sorted(named) == mj.shipped_patterns()
    for name in named:
        assert min(attention_size(mj.load_shipped(name))) > 0
