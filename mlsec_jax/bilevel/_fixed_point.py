"""Fixed-point numbers of 64 bits in two uint32 words, and their exactly invertible product with a fraction.

Nothing here needs x64: every integer is a uint32, and every product or quotient that is taken fits in one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

LIMB = 16  # bits; factors and divisors are at most 2**LIMB, so that limb * factor + carry fits in a uint32
_MANTISSA = 53  # both float types are read as a mantissa of 53 bits, which may move up 10 bits below the sign
_HEADROOM = 63 - _MANTISSA


class Words(NamedTuple):
    """A two's complement integer of 64 bits, elementwise: `hi * 2**32 + lo`, both uint32 of one shape."""

    hi: jax.Array
    lo: jax.Array


def zeros(shape: tuple[int, ...]) -> Words:
    """The integer 0."""
    return Words(jnp.zeros(shape, jnp.uint32), jnp.zeros(shape, jnp.uint32))


def _ones_if(bit: jax.Array) -> jax.Array:
    """32 ones where the uint32 `bit` is 1, else 32 zeros."""
    return jnp.zeros_like(bit) - bit


def add(a: Words, b: Words) -> Words:
    """`a + b` modulo 2**64."""
    lo = a.lo + b.lo
    return Words(a.hi + b.hi + (lo < a.lo).astype(jnp.uint32), lo)


def negate(a: Words) -> Words:
    """`-a` modulo 2**64."""
    return add(Words(~a.hi, ~a.lo), Words(jnp.zeros_like(a.hi), jnp.ones_like(a.lo)))


def wrapped(a: Words, b: Words, total: Words) -> jax.Array:
    """Whether `total = add(a, b)` left the range of 64 bits."""
    return ((a.hi ^ total.hi) & (b.hi ^ total.hi)) >> 31 == 1


def encode(x: jax.Array, fraction_bits: int) -> tuple[Words, jax.Array]:
    """`x * 2**fraction_bits` as an integer, rounded towards zero.

    The bits of `x` are read as they stand, so that no compiler can fuse what made `x` with what is done here.

    Args:
      x: float32 or float64, any shape.
      fraction_bits: bits after the binary point.

    Returns:
      `(words, bad)`; `bad` is True where `x` is NaN, infinite or at least `2**(63 - fraction_bits)` in size.
    """
    if x.dtype == jnp.float32:
        raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
        sign, exponent = raw >> 31, (raw >> 23) & 0xFF
        mantissa = (raw & 0x7FFFFF) | (jnp.minimum(exponent, 1) << 23)
        hi, lo = mantissa >> 3, mantissa << 29
        shift = exponent.astype(jnp.int32) - (127 + _MANTISSA - 1 - fraction_bits)
    else:
        raw = jax.lax.bitcast_convert_type(x, jnp.uint32)  # [..., 2], the low word first
        lo, top = raw[..., 0], raw[..., 1]
        sign, exponent = top >> 31, (top >> 20) & 0x7FF
        hi = (top & 0xFFFFF) | (jnp.minimum(exponent, 1) << 20)
        shift = exponent.astype(jnp.int32) - (1023 + _MANTISSA - 1 - fraction_bits)
    up = jnp.clip(shift, 0, _HEADROOM).astype(jnp.uint32)
    down = jnp.clip(-shift, 0, 63).astype(jnp.uint32)
    hi, lo = (hi << up) | ((lo >> 1) >> (31 - up)), lo << up
    far, near = down >= 32, down & 31
    lo = jnp.where(far, hi >> near, (lo >> near) | ((hi << 1) << (31 - near)))
    hi = jnp.where(far, jnp.zeros_like(hi), hi >> near)
    size, flip = Words(hi, lo), _ones_if(sign)
    return add(Words(size.hi ^ flip, size.lo ^ flip), Words(jnp.zeros_like(hi), sign)), shift > _HEADROOM


def decode(a: Words, fraction_bits: int, dtype: jnp.dtype) -> jax.Array:
    """`a * 2**-fraction_bits`, rounded to the float `dtype`.

    The products are with powers of two and so exact: contracting them into the sum changes no bit.
    """
    sign = a.hi >> 31
    flip = _ones_if(sign)
    size = add(Words(a.hi ^ flip, a.lo ^ flip), Words(jnp.zeros_like(sign), sign))
    value = size.hi.astype(dtype) * 2.0 ** (32 - fraction_bits) + size.lo.astype(dtype) * 2.0**-fraction_bits
    return jnp.where(sign == 1, -value, value)


def _divmod(a: Words, d: int) -> tuple[Words, jax.Array]:
    """`floor(a / d)` and `a - d * floor(a / d)` for a static `1 <= d <= 2**LIMB`, by long division in 16-bit limbs."""
    sign = a.hi >> 31
    flip = _ones_if(sign)
    hi, lo = a.hi ^ flip, a.lo ^ flip  # for a < 0 this is -1 - a, and floor(a / d) = -1 - floor((-1 - a) / d)
    rest = jnp.zeros_like(hi)
    limbs = []
    for limb in (hi >> LIMB, hi & 0xFFFF, lo >> LIMB, lo & 0xFFFF):
        now = (rest << LIMB) | limb
        quotient = now // d
        rest = now - quotient * d
        limbs.append(quotient)
    quotient_words = Words(((limbs[0] << LIMB) | limbs[1]) ^ flip, ((limbs[2] << LIMB) | limbs[3]) ^ flip)
    return quotient_words, jnp.where(sign == 1, (d - 1) - rest, rest)


def _multiply_add(a: Words, n: int, digit: jax.Array) -> Words:
    """`a * n + digit` modulo 2**64 for a static `1 <= n <= 2**LIMB` and `0 <= digit < 2**LIMB`."""
    low = (a.lo & 0xFFFF) * n + digit
    high = (a.lo >> LIMB) * n + (low >> LIMB)
    return Words(a.hi * n + (high >> LIMB), (high << LIMB) | (low & 0xFFFF))


def multiply_rational(a: Words, store: jax.Array, n: int, d: int) -> tuple[Words, jax.Array]:
    """`a * n / d` with no bit lost; `multiply_rational(*result, d, n)` takes it back.

    The remainder of `a / d` is pushed on the store, and the last digit of `a * n` is popped from it
    (Maclaurin, Duvenaud & Adams 2015, Algorithm 3): `store <- (store * d + a mod d) div n`. The result differs
    from `a * n / d` by less than `n`.

    Args:
      a: the integer.
      store: uint32 of the same shape, at most `2**32 / d - 1` (the caller keeps it so).
      n: numerator, static, `1 <= n <= 2**16`.
      d: denominator, static, `1 <= d <= 2**16`.

    Returns:
      `(product, store)`.
    """
    quotient, rest = _divmod(a, d)
    store = store * d + rest
    shorter = store // n
    return _multiply_add(quotient, n, store - shorter * n), shorter


def spill_schedule(n: int, d: int, num_steps: int) -> np.ndarray:
    """Before which of `num_steps` products by `n / d` the store must drop its low 16 bits to stay in a uint32.

    Bounds are followed in Python integers: with `store < bound`, a product leaves `store < ceil(bound * d / n)`.

    Returns:
      bool `[num_steps]`; about `num_steps * log2(d / n) / 16` of them are True.
    """
    spill = np.zeros(num_steps, bool)
    bound = 1
    for step in range(num_steps):
        if bound * d > 2**32:
            spill[step] = True
            bound = -(-bound >> LIMB)
        bound = -(-bound * d // n)
    return spill
