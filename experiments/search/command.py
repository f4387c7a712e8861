"""`minference search`: the pattern and the budget of every head of a model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

import minference_jax as mj
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.measure import peak_memory, stage
from experiments.common.options import LoadOptions
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.search.calibrate import encode_prompts, read_layers, score_layers
from experiments.search.choice import find, find_others
from experiments.search.options import CalibrationOptions
from experiments.search.report import Found, means, search_picture, summary, table
from experiments.search.space import SpaceOptions
from minference_jax.files import save_attention, save_original
from minference_jax.search import LayerScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Find the best pattern for each head: scores of all candidates, layer by layer.

    Killed and started again with the same options, it goes on with the first layer that is missing.
    --target, --budget, --objective and --original may change: the choice is then made anew from the
    scores there are, without the model.
    """

    model: LoadOptions
    calibration: CalibrationOptions = dataclasses.field(default_factory=CalibrationOptions)
    space: SpaceOptions = dataclasses.field(default_factory=SpaceOptions)
    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/search")
    """Folder for patterns.json and what else the same scores give (patterns_each.json,
    patterns_global.json, only_KIND.json), a picture, a record, and the scores of every layer."""

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        check_writable(self.output / "layers", folder=True)
        space = self.space.settled(self.calibration.length, self._scored_levels())
        dataclasses.replace(self, space=space)._run()

    def _run(self) -> None:
        progress, console = Console(stderr=True), Console()
        self._check_settings()
        already = len(read_layers(self.output / "layers"))
        with stage(progress, "searching") as searching:
            layers, tokens = self._scores(progress)
        length = max(tokens)
        with reported_as_user_error(ValueError):
            found = find(layers, self.space, length)
        others, missing = find_others(layers, self.space, length)
        console.print(table(found))
        console.print(f"chosen: {found.describe()}", soft_wrap=True)
        memory = peak_memory()
        console.print(f"peak memory: {memory / 2**30:.2f} GiB", highlight=False)
        for line in [*self._write(found), *self._write_others(others, missing)]:
            console.print(line, soft_wrap=True)
        append_record(
            self.output / "record.jsonl",
            kind="search",
            argv=sys.argv,
            config=self,
            result={
                "prompt_tokens": tokens,
                "layers_searched": len(layers) - already,
                "seconds": searching.seconds,
                "peak_memory_bytes": memory,
                **summary(found),
                "others": {name: means(other) for name, other in others.items()},
            },
        )
        console.print(f"record: {self.output / 'record.jsonl'}", soft_wrap=True)

    def _scores(self, progress: Console) -> tuple[list[LayerScores], list[int]]:
        """The scores of all layers and the lengths of the prompts; made where they are missing."""
        folder, complete = self.output / "layers", self.output / "complete.json"
        if complete.exists():
            with reported_as_user_error(OSError, ValueError):
                tokens = json.loads(complete.read_text(encoding="utf-8"))
            layers = read_layers(folder)
            if len(layers) == tokens["layers"]:
                return layers, tokens["prompt_tokens"]
        model = load(self.model, progress)
        prompts = encode_prompts(model, self.calibration)
        layers = score_layers(model, prompts, self.space, folder)
        tokens = {"layers": len(layers), "prompt_tokens": [len(x) for x in prompts]}
        complete.write_text(json.dumps(tokens) + "\n", encoding="utf-8")
        return layers, tokens["prompt_tokens"]

    def _settings(self) -> dict[str, Any]:
        """The settings of the search that the folder holds, {} without one."""
        path = self.output / "settings.json"
        if not path.exists():
            return {}
        with reported_as_user_error(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))

    def _scored_levels(self) -> list[float] | None:
        made = self._settings().get("space", {})
        return made.get("levels") if made.get("space") == self.space.space else None

    def _check_settings(self) -> None:
        """Raises UserError if the folder holds scores that were made with other settings."""
        settings = {
            "model": {**dataclasses.asdict(self.model), "dtype": str(self.model.jax_dtype)},
            "calibration": self.calibration.settings(),
            "space": self.space.settings(),
        }
        settings = json.loads(json.dumps(settings, default=str))
        path = self.output / "settings.json"
        if not path.exists():
            path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            return
        made = self._settings()
        if made != settings:
            raise UserError(
                f"{self.output} holds a search with other settings "
                f"({_differences(made, settings)}); take another --output, or delete the folder"
            )

    def _write(self, found: Found) -> list[str]:
        path = self.output / "patterns.json"
        save_attention(found.attention, path)
        lines = [f"patterns: {path}"]
        if self.space.original and isinstance(found.attention, mj.HeadPatterns):
            path = self.output / "best_pattern.json"
            scores = found.of_chosen(self.space.compared_by)
            save_original(found.attention, path, scores=scores)
            lines.append(f"MInference's format: {path}")
        title = f"{Path(self.model.model).name}: {self.calibration.describe()}, {found.describe()}"
        picture = search_picture(found, title=title, path=self.output / "patterns.png")
        return [*lines, f"picture: {picture}"]

    def _write_others(self, others: dict[str, Found], missing: dict[str, str]) -> list[str]:
        lines = []
        for name, found in others.items():
            path = self.output / f"{name}.json"
            save_attention(found.attention, path)
            lines.append(f"{name}: {found.describe()}: {path}")
        for name, why in missing.items():
            # One of another target must not stay.
            (self.output / f"{name}.json").unlink(missing_ok=True)
            lines.append(f"{name}: not written, {why}")
        return lines


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two settings, in words."""
    words = []
    for group in wanted:
        for name, value in wanted[group].items():
            before = made.get(group, {}).get(name)
            if before != value:
                words.append(f"--{name.replace('_', '-')} was {before}, now {value}")
    return "; ".join(words) or "they are of another version"
