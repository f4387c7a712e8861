"""Methods as the command line writes them: `hybrid:0.1,1000` is a family and its budget.

A suffix says what is kept of the prompt for decoding: `hybrid:0.1,1000+snapkv:1024`.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jax
import numpy as np
from rich.console import Console

import minference_jax as mj
from experiments.common.attention import check_size, explain_default, read_attention
from experiments.common.errors import UserError, one_line
from experiments.common.families import FAMILIES
from experiments.common.kv_cache import Compression, is_compression, parse_compression
from minference_jax.files import attention_size
from minference_jax.kv_cache import KVCompression
from models import Model

Number = int | float | str

# Families whose methods are files, not budgets.
FROM_FILE = ("patterns", "shuffled", "static")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One method with its budget.

    Attributes:
        family: its name; budgets of a family make one line of the plot.
        label: family, budget and what is kept for decoding, written in one way only.
        sha256: of what a file holds, or of what is recommended for a model once that is known (see
            `for_model`): a record must not confuse its versions.
        attention: makes the attention of a model of some layers and heads.
        kept: what is kept of the prompt for decoding, everything if None.
        whole: whether a prompt must be read whole, not in chunks.
        calibrated: seed of the prompt that the lines of `attention` are taken from, in place of
            those of the prompt at hand; None if there is none.
    """

    family: str
    label: str
    sha256: str | None = None
    attention: Callable[[int, int], Any] = dataclasses.field(compare=False, repr=False)
    kept: Compression | None = dataclasses.field(default=None, compare=False, repr=False)
    whole: bool = dataclasses.field(default=False, compare=False, repr=False)
    calibrated: int | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def slug(self) -> str:
        """The label as the name of a folder or file."""
        return slug(self.label)

    def compression(self, num_layers: int) -> KVCompression | None:
        """What a model of some layers keeps of the prompt for decoding, None for everything."""
        return None if self.kept is None else self.kept.make(num_layers)


def slug(label: str) -> str:
    """Returns a method's label as the name of a folder or file; other labels have other names."""
    return quote(label.replace(":", "-"), safe="+,")


def dense() -> Method:
    """The method that the others are compared with."""
    return parse_method("dense")


def parse_methods(specs: Sequence[str]) -> list[Method]:
    """Returns the methods named on the command line.

    Raises:
        UserError: there is none, one is not a method, or two have the same name.
    """
    if not specs:
        raise UserError("--methods must name at least one method")
    methods: dict[str, Method] = {}
    for spec in specs:
        method = parse_method(spec)
        if (other := methods.get(method.slug)) is not None:
            advice = "remove one" if other == method else "their files differ, so rename one"
            raise UserError(f"--methods names {method.label} twice; {advice}")
        methods[method.slug] = method
    return list(methods.values())


def for_model(methods: Sequence[Method], model: Model, console: Console) -> list[Method]:
    """Returns methods as they run on a model: `minference` is what is recommended for it.

    Args:
        methods: the methods.
        model: the model that they run on.
        console: told what `minference` is, if it is among them.
    """
    if all(method.family != "minference" for method in methods):
        return list(methods)
    sizes = model.config.num_layers, model.config.num_heads
    recommended = mj.recommended_attention(*sizes, model.name)
    others = "--methods can name others, as patterns:FILE"
    console.print(explain_default(model, others=others), highlight=False, soft_wrap=True)
    return [
        dataclasses.replace(
            method, sha256=_digest(recommended), attention=lambda layers, heads: recommended
        )
        if method.family == "minference"
        else method
        for method in methods
    ]


def parse_whole_cache_methods(specs: Sequence[str], *, why: str) -> list[Method]:
    """`parse_methods` for a command that cannot keep less than the whole cache; `why` it cannot.

    Raises:
        UserError: as `parse_methods`, or a method keeps a part only.
    """
    methods = parse_methods(specs)
    for method in methods:
        if method.kept is not None:
            raise UserError(f"--methods: {why}; leave out +{method.kept.label} of {method.label}")
    return methods


def parse_method(spec: str) -> Method:
    """Returns one method; raises UserError if it is none."""
    written, plus, suffix = spec.rpartition("+")
    of_file = spec.partition(":")[0] in FROM_FILE
    # A file's name may hold a plus, and so may a number: 1e+0.
    if not (plus and suffix[:1].isalpha()) or (of_file and not is_compression(suffix)):
        return _parse_attention(spec)
    kept = parse_compression(suffix, option=f"--methods: {spec!r}: what follows +")
    method = _parse_attention(written)
    return dataclasses.replace(method, label=f"{method.label}+{kept.label}", kept=kept)


def _parse_attention(spec: str) -> Method:
    name, _, rest = spec.partition(":")
    if name in FROM_FILE:
        return _from_file(name, rest, spec)
    if name not in FAMILIES:
        raise UserError(f"--methods: {spec!r} is no method; known: {usage()}")
    family = FAMILIES[name]
    words = rest.split(",") if rest else []
    if not family.required <= len(words) <= len(family.numbers):
        raise UserError(
            f"--methods: expected {family.usage(name)}, got {len(words)} numbers in {spec!r}"
        )
    numbers = {
        key: _number(word, key, kind, spec)
        for (key, kind), word in zip(family.numbers.items(), words, strict=False)
    }
    try:
        made = family.make(**numbers)
    except ValueError as error:
        raise UserError(f"--methods: {spec!r}: {one_line(error)}") from error
    budget = ",".join(str(number).removesuffix(".0") for number in numbers.values())
    return Method(
        family=name,
        label=f"{name}:{budget}" if budget else name,
        attention=functools.partial(family.attention, made),
        whole=family.whole,
    )


def _digest(attention: Any) -> str:
    """What is static decides as much as the arrays."""
    digest = hashlib.sha256(str(jax.tree.structure(attention)).encode())
    for leaf in jax.tree.leaves(attention):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _number(word: str, name: str, kind: type, spec: str) -> Number:
    try:
        return kind(word)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"--methods: {spec!r}: {name} must be {wanted}, got {word!r}") from None


def _from_file(family: str, rest: str, spec: str) -> Method:
    """What a file holds, or a shipped one; see the README for what the families make of it."""
    name, seed = rest, None
    if family != "patterns":
        path, _, word = rest.rpartition(",")
        name, seed = (path, int(word)) if path and word.isdecimal() else (rest, 0)
    try:
        made = read_attention(name)
    except UserError as error:
        raise UserError(
            f"--methods: {spec!r}: expected {family}:FILE with a pattern file; {error}"
        ) from error
    made = dataclasses.replace(made, break_even=0)  # as for budgets that are named
    if family == "static":
        _check_lines(made, spec)

    def attention(layers: int, heads: int) -> Any:
        check_size(made, name, num_layers=layers, num_heads=heads)
        return _shuffled(made, seed or 0) if family == "shuffled" else made

    # A label has no folders: they are this machine's business.
    label = f"{family}:{Path(name).name}" + ("" if seed is None else f",{seed}")
    calibrated = seed if family == "static" else None
    return Method(
        family=family, label=label, sha256=_digest(made), attention=attention, calibrated=calibrated
    )


def _check_lines(attention: Any, spec: str) -> None:
    """Raises UserError unless there are lines that another prompt could decide."""
    if not isinstance(attention, mj.SparseAttention):
        raise UserError(
            f"--methods: {spec!r}: static needs a file of patterns, and this one holds thresholds"
        )
    if not np.any(np.asarray(attention.patterns.kind) == mj.Kind.VERTICAL_SLASH):
        raise UserError(
            f"--methods: {spec!r}: no head of this file is vertical_slash, so that static would be "
            "patterns; take that"
        )


def _shuffled(attention: Any, seed: int) -> Any:
    """The same parameters at other heads: the baseline of an assignment that means something."""
    order = np.random.default_rng(seed).permutation(math.prod(attention_size(attention)))
    return jax.tree.map(lambda x: x.reshape(-1)[order].reshape(x.shape), attention)


def usage() -> str:
    """How all methods are written."""
    families = (family.usage(name) for name, family in FAMILIES.items())
    of_files = ("patterns:NAME_OR_FILE", "shuffled:NAME_OR_FILE[,SEED]")
    return ", ".join([*families, *of_files, "static:NAME_OR_FILE[,SEED]"])
