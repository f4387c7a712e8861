"""TriangleMix: whole attention in the first layers, triangles in the others."""

from minference_jax.patterns import Dense, HeadPatterns, Pattern, TriShape


def triangle_mix(
    *,
    num_layers: int,
    num_heads: int,
    first_triangle: int,
    sink_size: int,
    window_size: int,
    last_size: int,
    shallow: Pattern | None = None,
) -> HeadPatterns:
    """Patterns for `SparseAttention`: dense below layer `first_triangle`, tri-shape from there on.

    A triangle is a sink, a local window, and the last rows whole (arXiv:2507.21526); nothing is
    estimated.

    Args:
        num_layers: layers of the model.
        num_heads: query heads of a layer.
        first_triangle: layers before this one are shallow.
        sink_size: leading keys every query sees.
        window_size: nearest keys every query sees, itself included.
        last_size: last queries that attend densely; whole query tiles.
        shallow: pattern of the shallow layers, dense if None.

    Raises:
        ValueError: `first_triangle` is not within 0..num_layers, or a size is out of range.
    """
    if not 0 <= first_triangle <= num_layers:
        raise ValueError(f"`first_triangle` must be within 0..{num_layers}, got {first_triangle}")
    triangle = TriShape(sink_size=sink_size, window_size=window_size, last_size=last_size)
    shallow = Dense() if shallow is None else shallow
    grid = [
        [shallow if layer < first_triangle else triangle] * num_heads for layer in range(num_layers)
    ]
    return HeadPatterns.from_grid(grid)
