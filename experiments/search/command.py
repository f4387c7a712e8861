"""`minference search`: the pattern and the budget of every head of a model."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console

from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.measure import peak_memory, stage
from experiments.common.options import LoadOptions
from experiments.common.record import append_record
from experiments.common.session import load
from experiments.search.calibrate import choose_each, encode_prompts, read_layers, score_layers
from experiments.search.options import CalibrationOptions, SpaceOptions
from experiments.search.report import Found, search_picture, summary, table
from minference_jax.files import save_original
from minference_jax.search import LayerScores, choose_globally, picked


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Find the best pattern for each head: scores of all candidates, layer by layer.

    Killed and started again with the same options, it goes on with the first layer that is missing.
    --objective and --original may change: the choice is then made anew from the scores there are.
    """

    model: LoadOptions
    calibration: CalibrationOptions = dataclasses.field(default_factory=CalibrationOptions)
    space: SpaceOptions = dataclasses.field(default_factory=SpaceOptions)
    output: Annotated[Path, tyro.conf.arg(metavar="PATH")] = Path("outputs/search")
    """Folder for patterns.json, a picture, a record, and the scores of every layer."""

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        layers_folder = self.output / "layers"
        check_writable(layers_folder, folder=True)
        self.space.check(self.calibration.length)
        self._check_settings()
        already = len(read_layers(layers_folder))
        model = load(self.model, progress)
        prompts = encode_prompts(model, self.calibration)
        with stage(progress, f"searching {model.config.num_layers - already} layers") as searching:
            layers = score_layers(model, prompts, self.space, layers_folder)
        length = max(map(len, prompts))
        found = self._found(layers, length)
        console.print(table(found))
        console.print(f"chosen: {found.describe()}", soft_wrap=True)
        memory = peak_memory()
        console.print(f"peak memory: {memory / 2**30:.2f} GiB", highlight=False)
        for name, path in self._write(found):
            console.print(f"{name}: {path}", soft_wrap=True)
        append_record(
            self.output / "record.jsonl",
            kind="search",
            argv=sys.argv,
            config=self,
            result={
                "prompt_tokens": [len(tokens) for tokens in prompts],
                "layers_searched": len(layers) - already,
                "seconds": searching.seconds,
                "peak_memory_bytes": memory,
                **summary(found),
            },
        )
        console.print(f"record: {self.output / 'record.jsonl'}", soft_wrap=True)

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
        with reported_as_user_error(OSError, ValueError):
            made = json.loads(path.read_text(encoding="utf-8"))
        if made != settings:
            raise UserError(
                f"{self.output} holds a search with other settings "
                f"({_differences(made, settings)}); take another --output, or delete the folder"
            )

    def _found(self, layers: list[LayerScores], length: int) -> Found:
        space = self.space
        if space.budget == "each":
            chosen = np.stack([choose_each(scores, space) for scores in layers])
        else:
            with reported_as_user_error(ValueError):
                chosen = choose_globally(
                    layers,
                    space.objective,
                    at_most=space.at_most or 1.0,
                    measure=space.measure,
                    group=space.group,
                )
        candidates, targets = space.candidates(length)
        return Found(
            patterns=picked(layers, chosen),
            layers=layers,
            chosen=chosen,
            objective=space.objective,
            candidates=candidates,
            targets=targets,
        )

    def _write(self, found: Found) -> list[tuple[str, Path]]:
        paths = [("patterns", self.output / "patterns.json")]
        found.patterns.save(paths[0][1])
        if self.space.original:
            paths.append(("MInference's format", self.output / "best_pattern.json"))
            save_original(found.patterns, paths[1][1], scores=found.of_chosen(self.space.objective))
        title = f"{Path(self.model.model).name}: {self.calibration.describe()}, {found.describe()}"
        picture = search_picture(found, title=title, path=self.output / "patterns.png")
        return [*paths, ("picture", picture)]


def _differences(made: dict[str, Any], wanted: dict[str, Any]) -> str:
    """What differs between two settings, in words."""
    words = []
    for group in wanted:
        for name, value in wanted[group].items():
            before = made.get(group, {}).get(name)
            if before != value:
                words.append(f"--{name.replace('_', '-')} was {before}, now {value}")
    return "; ".join(words) or "they are of another version"
