"""Studies: results that may stand in one table, because all that decides them is the same."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluation.folder import flat
from experiments.report.markdown import link, short_revision
from experiments.report.read import Entry, as_this_version_writes

# Options that decide no figure, or that show in the names of samples.
_FREE = ("output", "methods", "limit", "modes", "texts")
# Those that tables show.
_SHOWN = ("lengths", "length", "tasks", "samples", "depths", "rounds", "turns")
_WORDS = {"git": "revision", "model_sha256": "digest of the model"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study[Result]:
    """What methods made of the same samples with one model, under the same conditions.

    Attributes:
        kind: of the records.
        mode: of conversations, otherwise None.
        model: name of its file or folder.
        model_sha256: of its configuration and part of its weights; None of older records.
        device: that it ran on.
        git: revision of the code, with `+changes` if files differed from it; None if unknown.
        jax: version.
        settings: other options by their dotted names.
        samples: names of all of them.
        files: of the records.
        days: of the records.
        batches: prompts read together, of the records: it decides times a little, answers never.
        methods: the results by label, dense first.
        apart: from each earlier study of the model, what differs.
    """

    kind: str
    mode: str | None
    model: str
    model_sha256: str | None
    device: str
    git: str | None
    jax: str
    settings: dict[str, Any]
    samples: frozenset[Hashable]
    files: list[Path] = dataclasses.field(default_factory=list)
    days: list[str] = dataclasses.field(default_factory=list)
    batches: set[int] = dataclasses.field(default_factory=set)
    methods: dict[str, Result] = dataclasses.field(default_factory=dict)
    apart: list[str] = dataclasses.field(default_factory=list)

    def source(self, folder: Path, number: str) -> str:
        """What a table of the study was made from, in short.

        Args:
            folder: of the page that the table is on, for links.
            number: of samples, in words.
        """
        files = ", ".join(link(path, folder) for path in self.files)
        return f"{number}, revision {short_revision(self.git)}, {files}."

    def caption(self, folder: Path, number: str) -> str:
        """What a table of the study was made from, with all options; see `source`."""
        days = " to ".join(sorted({min(self.days), max(self.days)}))
        settings = ", ".join(
            _in_words(name, value)
            for name, value in self.settings.items()
            if value is not None and name.rpartition(".")[2] not in _SHOWN
        )
        if self.batches:
            settings += f", batch size {' and '.join(map(str, sorted(self.batches)))}"
        text = f"{self.device}, JAX {self.jax}, {days}; {settings}; {self.source(folder, number)}"
        if self.apart:
            text += f" In a table of its own: it differs from others in {' / '.join(self.apart)}."
        return text


def _unlike(one: Study[Any], other: Study[Any]) -> list[str]:
    """What keeps results out of one table, in words."""
    names = [
        name
        for name in ("model_sha256", "device", "git", "jax", "samples")
        if getattr(one, name) != getattr(other, name)
    ]
    names += [
        name
        for name in one.settings.keys() | other.settings.keys()
        if one.settings.get(name) != other.settings.get(name)
    ]
    return sorted({_WORDS.get(name, name.rpartition(".")[2]) for name in names})


def _in_words(name: str, value: Any) -> str:
    """An option: `seed 0`, `no lead`."""
    words = name.rpartition(".")[2].replace("_", " ")
    if isinstance(value, bool):
        return words if value else f"no {words}"
    # The folders of a path are its machine's business.
    return f"{words} {value.rpartition('/')[2]}" if isinstance(value, str) else f"{words} {value}"


def studies[Result](
    entries: Iterable[Entry],
    read: Callable[[dict[str, Any]], Sequence[tuple[str | None, Iterable[Hashable], Result]]],
) -> list[Study[Result]]:
    """Returns the studies that records are of.

    Results are of one study if model, options, samples, device, revision and JAX are the same. A
    revision that does not say what ran (none, or with changes) is the same in one file only. Of a
    method that occurs twice, the second result begins another study.

    Args:
        entries: records of one kind of command.
        read: of a record the mode, the names of the samples, and the result; of each mode.

    Raises:
        UserError: a record is not as this version writes it, or holds no results.
    """
    found: dict[Hashable, list[Study[Result]]] = {}
    for entry in entries:
        with as_this_version_writes(entry):
            conditions = _conditions(entry)
            batch = conditions["settings"].pop("batch_size", None)
            label = entry.record["result"]["method"]
            day = entry.record["environment"]["date"][:10]
            parts = [(mode, frozenset(names), result) for mode, names, result in read(entry.record)]
            if not parts or not all(samples for _, samples, _ in parts):
                raise ValueError("it holds no results")
        git = conditions["git"]
        unsure = git is None or git.endswith("+changes")
        for mode, samples, result in parts:
            key = (json.dumps(conditions), mode, samples, entry.path if unsure else None)
            alike = found.setdefault(key, [])
            study = next((each for each in alike if label not in each.methods), None)
            if study is None:
                study = Study(mode=mode, samples=samples, **conditions)
                alike.append(study)
            study.methods[label] = result
            study.days.append(day)
            if batch is not None:
                study.batches.add(batch)
            if entry.path not in study.files:
                study.files.append(entry.path)
    whole: list[Study[Result]] = []
    for study in (study for alike in found.values() for study in alike):
        kin = [one for one in whole if (one.model, one.mode) == (study.model, study.mode)]
        apart = [_unlike(one, study) or ["its run"] for one in kin]
        whole.append(_dense_first(study, apart))
    return whole


def _dense_first[Result](study: Study[Result], apart: list[list[str]]) -> Study[Result]:
    order = sorted(study.methods, key=lambda label: label != "dense")
    methods = {label: study.methods[label] for label in order}
    reasons = list(dict.fromkeys(", ".join(names) for names in apart))
    return dataclasses.replace(study, methods=methods, apart=reasons)


def _conditions(entry: Entry) -> dict[str, Any]:
    config, environment = entry.record["config"], entry.record["environment"]
    settings = flat({name: value for name, value in config.items() if name not in _FREE})
    # Where the model lies does not matter.
    return {
        "kind": entry.record["kind"],
        "model": Path(settings.pop("model.model")).name,
        "model_sha256": entry.record["result"].get("model_sha256"),
        "device": environment["device"],
        "git": environment["git"],
        "jax": environment["jax"],
        "settings": settings,
    }
