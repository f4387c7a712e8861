"""`minference ttft`: time to first token of a whole model by prompt length."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from jax.sharding import Mesh
from rich.console import Console

import minference_jax as mj
from experiments.common.devices import DeviceOptions
from experiments.common.errors import UserError, check_writable, reported_as_user_error
from experiments.common.measure import stage
from experiments.common.methods import Method, for_model, usage
from experiments.common.options import (
    LoadOptions,
    OptionalInt,
    OptionalPath,
    OptionalText,
    at_least,
)
from experiments.common.record import append_record, environment, remove_cut_line
from experiments.common.session import sketch
from experiments.common.shapes import SHAPES, ShapeName
from experiments.perplexity.texts import files_of
from experiments.ttft import flops, parts, whole
from experiments.ttft.attention import read_methods
from experiments.ttft.devices import check_devices, label_of, mesh_of, spread
from experiments.ttft.plot import parts_picture, seconds_picture
from experiments.ttft.prescribed import Densities
from experiments.ttft.rows import KIND, Figures, Point, Rows, read_rows
from experiments.ttft.subject import Subject, first_layers, of_model, of_shape, shortened
from experiments.ttft.table import line, markdown
from experiments.ttft.whole import Case
from minference_jax.pairs import Executed
from pallas_kernels.common.timing import Programs

_DENSE = ("dense", "cudnn")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ttft:
    """Time to first token of a whole model by prompt length, and where the time goes.

    With --model the weights are real and the prompt is text. With --shape they are random: the
    scores of such heads mean nothing, so adaptive methods run their estimate at its full cost but
    visit as many key blocks as a real model's heads did at the same length (--densities). Lengths
    are measured from the shortest: the device's peak of memory is never reset.
    """

    model: OptionalText = None
    """A .gguf file, a Hugging Face or Orbax directory, or a hub id such as org/name."""
    shape: Annotated[ShapeName | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")] = None
    """In place of --model: llama3-8b, qwen2.5-7b or smollm2-135m with random weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and activations; auto: float32 on a CPU, bfloat16 elsewhere."""
    tokenizer: OptionalPath = None
    """Directory with the tokenizer.json to use instead of the model's own tokenizer."""
    rope_scaling: OptionalText = None
    """KIND:FACTOR (linear, dynamic or yarn) stretches the context, for example yarn:4."""
    texts: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="")
    ] = ()
    """With --model: UTF-8 files, and folders of .txt files, read one after the other; a chapter if
    not given. Prompts longer than all of it repeat it, which is told and recorded."""
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    """Tokens of the prompts."""
    methods: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="METHOD [METHOD ...]",
            help=f"Attention: {usage()}; cudnn: dense attention by cuDNN.",
        ),
    ] = ("dense", "minference")
    kv_cache: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="KEPT [KEPT ...]", help_behavior_hint="")
    ] = ("all",)
    """What is kept of the prompt: all, int8, fp8, snapkv:1024, …, none (as in `minference
    prefill`). Of several the first that fits the device by estimate, for each length and method;
    rows say which."""
    chunk_size: OptionalInt = None
    """Tokens read at a time; the whole prompt if not given. Then there are no parts."""
    densities: OptionalPath = None
    """Folder. With --model, the key blocks that adaptive methods visit are written there; with
    --shape they are read from there."""
    dense_layers: OptionalInt = None
    """Run dense methods on this many layers only, and extrapolate linearly, which rows say."""
    part_layers: int = 2
    """First layers whose parts are timed apart (0: none); on one device only."""
    repeats: int = 3
    """Timed runs after one to warm up; where that takes over 5 s it is the only run."""
    peak_tflops: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = (
        None
    )
    """The device's peak, for the time that the prompt's operations would take at it; of the data
    sheet for an H200, H100 or A100 in bfloat16."""
    seed: int = 0
    """Seed of random weights and tokens."""
    record: OptionalPath = None
    """JSONL file: each row is appended as soon as it is measured, and rows it has are skipped."""
    render: bool = False
    """Measure nothing: show what the record holds."""
    plot: OptionalPath = None
    """Folder for the table and the pictures."""
    devices: DeviceOptions = dataclasses.field(default_factory=DeviceOptions)

    def __post_init__(self) -> None:
        """Raises UserError for options out of range or that clash."""
        if self.render:
            if self.record is None:
                raise UserError("--render shows a record; name its file with --record")
            return
        if (self.model is None) == (self.shape is None):
            given = "both" if self.model is not None else "neither"
            raise UserError(f"expected one of --model and --shape, got {given}")
        if self.shape is not None and (self.texts or self.rope_scaling or self.tokenizer):
            raise UserError("--texts, --rope-scaling and --tokenizer belong to --model")
        if not self.lengths or not self.kv_cache:
            raise UserError("--lengths and --kv-cache must name at least one each")
        at_least("lengths", min(self.lengths), 1)
        at_least("chunk_size", self.chunk_size, 1)
        at_least("dense_layers", self.dense_layers, 1)
        at_least("part_layers", self.part_layers, 0)
        at_least("repeats", self.repeats, 1)
        for label in self.kv_cache:
            whole.compression_of(label, 1)

    def run(self) -> None:
        """Runs the command; raises UserError if an input cannot be used."""
        progress, console = Console(stderr=True), Console()
        if self.plot is not None:
            check_writable(self.plot, folder=True)
        if self.record is not None:
            check_writable(self.record, folder=False)
            if self.record.exists():
                remove_cut_line(self.record)
        if not self.render:
            self._measure(progress, console)
        if self.record is not None:
            with reported_as_user_error(OSError, ValueError):
                rows = read_rows(self.record, like=None)
            if not rows.figures:
                raise UserError(f"{self.record} holds no rows; leave --render out to measure")
            self._show(rows, console)

    def _load(
        self, methods: list[Method], mesh: Mesh | None, progress: Console
    ) -> tuple[Subject, list[Method]]:
        longest, how = max(self.lengths), {"console": progress, "mesh": mesh}
        options = LoadOptions(
            model=self.model or "", dtype=self.dtype, tokenizer=self.tokenizer,
            rope_scaling=self.rope_scaling,
        )  # fmt: skip
        whole = self.chunk_size is None
        if self.shape is not None:
            check_devices(methods, SHAPES[self.shape](), mesh, whole=whole)
            return of_shape(
                self.shape, dtype=options.jax_dtype, longest=longest, seed=self.seed, **how
            ), methods  # fmt: skip
        if mesh is not None:
            model = sketch(options)
            known = for_model(methods, model, Console(quiet=True))
            check_devices(known, model.config, mesh, whole=whole)
        subject = of_model(options, files_of(self.texts), longest=longest, **how)
        assert subject.model is not None
        return subject, for_model(methods, subject.model, progress)

    def _measure(self, progress: Console, console: Console) -> None:
        """Measures what the record lacks, and appends it."""
        mesh = mesh_of(self.devices)
        methods = read_methods(self.methods, chunked=self.chunk_size is not None)
        rows = Rows(figures={}, environment={})
        if self.record is not None:
            with reported_as_user_error(OSError, ValueError):
                rows = read_rows(self.record, like=environment(sys.argv))
        subject, methods = self._load(methods, mesh, progress)
        cases = [(length, method) for length in sorted(set(self.lengths)) for method in methods]
        # What cannot run is told before anything has.
        ready = [self._prepare(subject, length, method, mesh) for length, method in cases]
        wanted = [(point, case) for point, case in ready if point not in rows.figures]
        if len(wanted) < len(ready):
            progress.print(f"{len(ready) - len(wanted)} rows are in {self.record} already")
        programs = Programs()
        for point, case in wanted:
            whole.add(programs, case)
            if self._splits(point):
                parts.add_shared(programs, subject, point.length, layers=self.part_layers)
                parts.add_split(programs, case)
            elif point.extrapolated and mesh is None:
                parts.add_shared(programs, subject, point.length, layers=0)
            elif point.extrapolated:
                parts.add_ends(programs, case)
        with stage(progress, f"compiling {len(wanted)} prefills and their parts side by side"):
            programs.compile()
        shared: dict[int, parts.Shared] = {}
        for point, case in wanted:
            figures = self._row(programs, subject, point, case, shared, progress)
            console.print(line(point, figures), highlight=False, soft_wrap=True)
            if self.record is not None:
                append_record(self.record, kind=KIND, argv=sys.argv, config=point, result=figures)

    def _splits(self, point: Point) -> bool:
        """Whether a row's parts are timed."""
        whole = self.chunk_size is None and not point.extrapolated
        return self.part_layers > 0 and whole and point.mesh is None

    def _prepare(
        self, subject: Subject, length: int, method: Method, mesh: Mesh | None
    ) -> tuple[Point, Case]:
        """A row's name, and what runs for it."""
        config = subject.config
        attention = method.attention(config.num_layers, config.num_heads)
        source = None
        if self.shape is not None and isinstance(attention, mj.AdaptiveAttention):
            if self.densities is None:
                raise UserError(
                    f"{method.label} adapts to scores, and those of random weights mean nothing: "
                    "name a folder that a run with --model wrote with --densities"
                )
            if self.chunk_size is not None:
                raise UserError("--densities are of whole prompts; leave out --chunk-size")
            attention, source = Densities(folder=self.densities).prescribe(
                method, attention, length, layers=config.num_layers, heads=config.num_heads,
                head_dim=config.head_dim,
            )  # fmt: skip
        layers = config.num_layers
        if self.dense_layers is not None and method.family in _DENSE:
            layers = min(self.dense_layers, layers)
        point = Point(
            model=subject.name, random_weights=self.shape is not None,
            rope_scaling=self.rope_scaling, text=subject.text, length=length, method=method.label,
            sha256=method.sha256, densities=source, kv_cache=self.kv_cache,
            chunk_size=self.chunk_size, dtype=str(subject.params["embed"]["embedding"].dtype),
            layers=config.num_layers, timed_layers=layers, mesh=label_of(mesh),
        )  # fmt: skip
        attention, timed = spread(first_layers(attention, layers), mesh), shortened(subject, layers)
        cache = whole.choose_cache(self.kv_cache, timed, attention, length, self.chunk_size)
        case = Case(
            name=f"{method.label}, {length:,} tokens", subject=timed, length=length,
            attention=attention, cache=cache, chunk_size=self.chunk_size,
        )  # fmt: skip
        return point, case

    def _row(
        self, programs: Programs, subject: Subject, point: Point, case: Case,
        shared: dict[int, parts.Shared], progress: Console,
    ) -> Figures:  # fmt: skip
        """Measures one row."""
        length, tokens = point.length, subject.tokens(point.length)
        figures, executed = whole.measure(
            programs, case, tokens, repeats=self.repeats, always_warm=point.extrapolated,
            console=progress,
        )  # fmt: skip
        if executed is not None:
            figures["executed_share"] = whole.executed_share(executed, length)
            self._keep_densities(subject, point, case.attention, executed)
        splits = self._splits(point)
        if point.extrapolated and point.mesh is not None:
            ends = parts.measure_ends(programs, case, tokens)
            figures["seconds"] = parts.extrapolate(
                figures["seconds"], ends, timed=point.timed_layers, layers=point.layers
            )
        elif splits or point.extrapolated:
            if length not in shared:
                shared[length] = parts.measure_shared(programs, subject, tokens)
            figures |= parts.linear_figures(subject, shared[length], length)
        if splits:
            figures |= parts.split(
                programs, case, tokens, figures["seconds"], executed, shared[length],
                layers=self.part_layers,
            )  # fmt: skip
        elif point.extrapolated and point.mesh is None:
            ends = shared[length].ends
            figures["seconds"] = parts.extrapolate(
                figures["seconds"], ends, timed=point.timed_layers, layers=point.layers
            )
            figures |= parts.by_difference(figures["seconds"], subject, shared[length])
        done = flops.prompt_flops(subject.config, length)
        peak = self.peak_tflops * 1e12 if self.peak_tflops else flops.device_peak()
        figures |= {f"{kind}_flops": number for kind, number in done.items()}
        figures["distinct_tokens"] = subject.distinct
        figures["devices"] = case.devices
        if peak is not None:
            figures["dense_seconds_at_peak"] = sum(done.values()) / (peak * case.devices)
        return figures

    def _keep_densities(
        self, subject: Subject, point: Point, attention: Any, executed: Executed
    ) -> None:
        if isinstance(attention, mj.ShardedAttention):
            attention = attention.attention
        adaptive = isinstance(attention, mj.AdaptiveAttention) and self.shape is None
        if self.densities is not None and adaptive:
            counts = whole.counts_of(executed, point.length)
            where = f"{subject.name}, {subject.text}"
            Densities(folder=self.densities).write(point.method, point.length, counts, where)

    def _show(self, rows: Rows, console: Console) -> None:
        text = markdown(rows)
        print(text)
        if self.plot is not None:
            (self.plot / "ttft.md").write_text(text + "\n", encoding="utf-8")
            console.print(f"table: {self.plot / 'ttft.md'}")
            for path in (
                seconds_picture(rows, self.plot / "ttft.png"),
                parts_picture(rows, self.plot / "ttft-parts.png"),
            ):
                if path is not None:
                    console.print(f"picture: {path}")
        console.print(f"record: {self.record}")
