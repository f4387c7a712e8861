"""Static room of attentions, made common so that few compiled programs serve many of them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import minference_jax as mj


def share_capacities(attentions: Sequence[Any]) -> list[Any]:
    """The same attentions with common static capacities, so that fewer programs serve them all.

    A capacity is room: what is visited does not change. Patterns of heads share two programs, with
    and without block-sparse heads; estimators that add columns share one for each kind of them.
    Static lines come later (`calibration`), from what has its capacity here.
    """
    patterns = [a.patterns for a in attentions if isinstance(a, mj.SparseAttention)]
    added = [a.estimator for a in attentions if _has_columns(a)]
    columns = max((p.max_columns for p in patterns), default=0)
    blocks = max((p.max_blocks for p in patterns), default=0)
    more = max((estimator.max_columns for estimator in added), default=0)

    def shared(attention: Any) -> Any:
        if isinstance(attention, mj.SparseAttention):
            own = attention.patterns
            room = {"max_columns": columns, "max_blocks": blocks if own.max_blocks else 0}
            return dataclasses.replace(attention, patterns=dataclasses.replace(own, **room))
        if _has_columns(attention):
            estimator = dataclasses.replace(attention.estimator, max_columns=more)
            return dataclasses.replace(attention, estimator=estimator)
        return attention

    return [shared(attention) for attention in attentions]


def _has_columns(attention: Any) -> bool:
    return isinstance(attention, mj.AdaptiveAttention) and isinstance(
        attention.estimator, mj.WithColumns
    )
