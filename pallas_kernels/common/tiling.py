"""Small integer helpers for tile sizes."""


def cdiv(a: int, b: int) -> int:
    """Smallest integer not below a / b."""
    return -(-a // b)


def round_up(a: int, b: int) -> int:
    """Smallest multiple of b not below a."""
    return cdiv(a, b) * b
