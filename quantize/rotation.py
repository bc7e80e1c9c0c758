"""Hadamard matrices: rotations by which outlier channels are spread over all channels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from lorgnette.errors import ConfigError

Array = NDArray[np.float32]

PALEY = {12: 11, 20: 19, 28: 13}
"""Orders that Paley's constructions give, with their primes."""
LARGEST_FACTOR = 64
"""Powers of two are applied in such factors: wider ones cost more, narrower ones more passes."""
SEED = 20240404


def hadamard(n: int) -> Array:
    """An orthonormal matrix all of whose elements are `1 / sqrt(n)` or its negative.

    n is a power of two times any of 12, 20 and 28; the matrix is the Kronecker product of theirs.
    With R this matrix, a residual stream of rows x becomes x R: a matrix that reads it becomes
    W R and one that writes it R^T W, both of `[rows, columns]` weights, and nothing else changes.

    Shapes: returns `[n, n]`.

    Raises:
        ConfigError: None is known here for this n.

    Source: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", arXiv
    2404.00456, section 3; Sylvester's doubling and Paley 1933, "On orthogonal matrices".
    """
    matrix = np.asarray(np.ones((1, 1)), np.float64)
    for factor in _factors(n):
        matrix = np.asarray(np.kron(matrix, _signs_of(factor)), np.float64)
    return np.asarray(matrix / np.sqrt(n), np.float32)


def rotate_columns(matrix: Array, n: int) -> Array:
    """Every n columns of a matrix times `hadamard(n)`, without forming that.

    The Kronecker factors are applied one after the other, to the digits of a column's number.

    Shapes: `matrix` `[rows, columns]`, columns a multiple of n; returns the same.

    Raises:
        ConfigError: No matrix is known for this n, or the columns are no multiple of it.
    """
    rows, columns = matrix.shape
    factors = _factors(n)
    if columns % n:
        raise ConfigError("the columns cannot be rotated", got=columns, wanted=f"a multiple of {n}")
    made, after = matrix.reshape(-1, n), n
    for factor in factors:
        after //= factor
        turn = (_signs_of(factor) / np.sqrt(factor)).astype(np.float32)
        if after == 1:
            made = made.reshape(-1, factor) @ turn
        else:
            made = turn.T @ made.reshape(-1, factor, after)
    return made.reshape(rows, columns)


def random_signs(n: int) -> Array:
    """Signs, always the same ones, for the rows of a rotation.

    With them `diag(signs) R` is a rotation too, by which what all channels have in common, such as
    a mean, does not all fall on one channel as by R alone: its first column is ones.

    Shapes: returns `[n]`, 1 and -1.
    """
    return np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), n)


def rotated(rows: Array) -> Array:
    """Rows `[R, D]` in the rotated basis: times `diag(random_signs(D)) hadamard(D)`."""
    width = rows.shape[1]
    return rotate_columns(rows * random_signs(width), width)


def rotated_back(rows: Array) -> Array:
    """Rows `[R, D]` of the rotated basis in the one that they came from."""
    width = rows.shape[1]
    return np.asarray(rows @ hadamard(width).T * random_signs(width), np.float32)


def _factors(n: int) -> tuple[int, ...]:
    """Orders whose product is n: those of Paley's first, then powers of two.

    Raises:
        ConfigError: There are none.
    """
    found = _split(n)
    if found is None:
        orders = ", ".join(map(str, PALEY))
        raise ConfigError(
            "no Hadamard matrix of this size is known here",
            got=n,
            wanted=f"a power of two times any of {orders}",
            hint="leave rotation out for this model",
        )
    return found


def _split(n: int) -> tuple[int, ...] | None:
    if n >= 1 and n & (n - 1) == 0:
        powers = []
        while n > 1:
            powers.append(min(n, LARGEST_FACTOR))
            n //= powers[-1]
        return tuple(powers)
    for order in PALEY:
        rest = _split(n // order) if n > 0 and n % order == 0 else None
        if rest is not None:
            return (order, *rest)
    return None


@lru_cache(maxsize=16)
def _signs_of(order: int) -> NDArray[np.float64]:
    """A Hadamard matrix of signs: Sylvester's for powers of two, else one of Paley's."""
    if order in PALEY:
        return _paley(PALEY[order])
    matrix = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _paley(prime: int) -> NDArray[np.float64]:
    """Paley's first construction for primes 3 mod 4, order p + 1; else his second, 2 (p + 1).

    Q holds the quadratic characters of i - j: 1 for squares mod p, -1 for others, 0 for 0.
    """
    squares = {i * i % prime for i in range(1, prime)}
    character = np.array([0.0, *(1.0 if i in squares else -1.0 for i in range(1, prime))])
    numbers = np.arange(prime)
    turn = -1.0 if prime % 4 == 3 else 1.0
    core = np.zeros((prime + 1, prime + 1))
    core[0, 1:], core[1:, 0] = 1, turn
    core[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    if prime % 4 == 3:
        return core + np.eye(prime + 1)
    pair, other = np.array([[1.0, 1], [1, -1]]), np.array([[1.0, -1], [-1, -1]])
    return np.asarray(np.kron(core, pair) + np.kron(np.eye(prime + 1), other), np.float64)
