"""The pattern search of one layer: every candidate's scores, and the best candidates."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from minference_jax.patterns import HeadPatterns, Pattern
from minference_jax.search.budget import fit_budgets
from minference_jax.search.calibration import Calibration, Calibrations, Group, Kernel, each, summed
from minference_jax.search.candidates import Candidates, for_each_candidate
from minference_jax.search.cost import Measure, work_of
from minference_jax.search.objective import Objective, differences
from minference_jax.search.scores import LayerScores, choose, picked
from minference_jax.search.space import FAMILIES, for_heads
from pallas_kernels import block_sparse_attention


def search_patterns(
    q: Float[Array, "batch length heads head_dim"],
    k: Float[Array, "batch length kv_heads head_dim"],
    v: Float[Array, "batch length kv_heads head_dim"],
    *,
    lengths: Int[Array, " batch"] | None = None,
    candidates: Sequence[Pattern] = FAMILIES,
    target: float | None = 0.25,
    objective: Objective = "output_error",
    measure: Measure = "flops",
    group: Group = "head",
    first_row: int = 0,
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> tuple[HeadPatterns, LayerScores]:
    """Finds the best pattern for each head of one layer (paper, Algorithm 1).

    Memory is O(length) for each head: candidates run one after another through one compiled
    program. For prompts that do not fit memory together, and for budgets shared by all layers, see
    `fit_budgets`, `score_candidates` and `allocate`.

    Args:
        q: queries of the calibration prompts, after rotary embedding.
        k: keys.
        v: values.
        lengths: real tokens of each prompt, all of them if None.
        candidates: one pattern each.
        target: the candidates' budgets are scaled to cost this share of dense attention, as
            executed. None: budgets are kept and the best candidate wins whatever it costs.
        objective: what is compared; see `search.objective`.
        measure: what cost is.
        group: "kv_group" finds one pattern for all heads that share keys and values.
        first_row: rows before it are not scored (the released search: 2500).
        kernel: how the attention will be executed.

    Returns:
        The patterns, [1, heads], and the scores of all candidates.

    Raises:
        ValueError: there are no candidates, the target is not above 0, or no row is left to score.
    """
    prompts = [Calibration(q, k, v, lengths)]
    if not candidates:
        raise ValueError("`candidates` must hold at least one pattern")
    if target is None:
        patterns = for_heads(candidates, q.shape[2])
    else:
        patterns = fit_budgets(
            candidates, prompts, target=target, measure=measure, group=group, kernel=kernel
        )
    scores = score_candidates(patterns, prompts, first_row=first_row, kernel=kernel)
    best = choose(scores, objective, at_most=target, measure=measure, group=group)
    return cast("HeadPatterns", picked([scores], best[None])), scores


def score_candidates(
    candidates: Candidates,
    prompts: Calibrations,
    *,
    first_row: int = 0,
    density: bool = True,
    kernel: Kernel = Kernel(),  # noqa: B008, immutable
) -> LayerScores:
    """Attends with every candidate, and compares with dense attention.

    Args:
        candidates: patterns [candidates, heads] of one layer; or an attention whose parameters are
            arrays [candidates, heads], or the same for all candidates: [heads] or a number.
        prompts: calibration prompts; sums are over all of them, so longer ones weigh more.
        first_row: rows before it are not scored.
        density: also count pairs of query and key; for long prompts that can take longer than to
            attend.
        kernel: how patterns will be executed. An attention knows that itself.

    Raises:
        ValueError: no row is left to score, there are no prompts, or a parameter has another shape.
        TypeError: `prompts` can be iterated only once.
    """
    heads, kv_heads = (x.shape[2] for x in next(each(prompts))[:2])
    candidates = for_each_candidate(candidates, heads)
    patterns = isinstance(candidates, HeadPatterns)
    if patterns:
        attention = kernel.attention(candidates)
    else:  # short prompts count, too
        attention = dataclasses.replace(candidates, break_even=0)
    measures = ("flops", "density") if density else ("flops",)
    changes, flops, *pairs = summed(
        prompts,
        lambda prompt: _sums(attention, kernel.dense(), prompt, first_row, measures=measures),
    )
    if not np.all(changes.rows > 0):
        raise ValueError(f"`first_row` ({first_row}) must be below the length of the prompts")
    return LayerScores(
        candidates=candidates,
        kv_heads=kv_heads,
        flops=flops.sparse / flops.dense,
        density=pairs[0].sparse / pairs[0].dense if density else None,
        output_error=changes.squared / np.maximum(changes.dense_squared, 1e-30),
        residual_error=None if changes.residual is None else changes.residual / changes.rows,
        recall=1.0 - changes.lost_mass / changes.rows,
        log_recall=-changes.lost_log_mass / changes.rows,
        count=changes.far_off / changes.elements,
    )


@functools.partial(jax.jit, static_argnames="measures")
def _sums(candidates, dense, prompt, first_row, *, measures):
    """Sums over the rows of some prompts, for every candidate: one program, with dense in it."""
    q, k, v, lengths, *residual = prompt
    length = q.shape[1]
    row = jnp.arange(length)[None, :]
    counted = (row >= first_row) & (row < (length if lengths is None else lengths[:, None]))

    def run(attention):
        # The compiler drops this output; the second call gives it with its log-sum-exps.
        _, index = attention.attend(q, k, v, lengths=lengths)
        return index, block_sparse_attention(
            q, k, v, index, lengths=lengths, implementation=attention.implementation,
            return_residuals=True,
        )  # fmt: skip

    _, wanted = run(dense)

    def one(attention):
        index, got = run(attention)
        work = (work_of(index, length, lengths, measure) for measure in measures)
        return differences(*got, *wanted, counted, *residual), *work

    return jax.lax.map(one, candidates)
