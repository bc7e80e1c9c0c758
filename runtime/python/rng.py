"""The random numbers of sampling, in integer arithmetic that every language can repeat.

The generator is SplitMix64. Its state is one unsigned 64-bit integer, the seed to begin with; all
arithmetic is modulo 2**64, `>>` is the logical shift and `^` is exclusive or. One step is

    state = state + 0x9E3779B97F4A7C15
    z = state
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    output = z ^ (z >> 31)

and a uniform number in [0, 1) is `(output >> 11) * 2**-53`, which a binary64 holds exactly. Seed
1234567 gives 6457827717110365317, 3203168211198807973, 9817491932198370423 first.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, with the
constants of Vigna's splitmix64.c.
"""

from __future__ import annotations

from lorgnette.errors import RequestError

SEED_LIMIT = 1 << 64
"""Seeds are whole numbers from 0 to one below this."""

_MASK = SEED_LIMIT - 1


class SplitMix64:
    """The generator described at the top of this file.

    Args:
        seed: A whole number in [0, 2**64).

    Raises:
        RequestError: The seed is not such a number.
    """

    def __init__(self, seed: int) -> None:
        """Puts the seed into the state."""
        self._state = check_seed(seed)

    def next_u64(self) -> int:
        """Steps once and returns 64 random bits."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        z = self._state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        return z ^ (z >> 31)

    def uniform(self) -> float:
        """Steps once and returns a number in [0, 1) with 53 random bits."""
        return (self.next_u64() >> 11) * 2.0**-53


def check_seed(seed: int) -> int:
    """Returns the seed where it is a whole number in [0, 2**64).

    Raises:
        RequestError: It is not.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise RequestError("the seed is out of range", got=repr(seed), wanted="0 to 2**64 - 1")
    return seed
