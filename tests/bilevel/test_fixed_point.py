"""Fixed-point integers in two words: against Python's integers."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax.bilevel import _fixed_point as fixed
from mlsec_jax.bilevel._reversible import buffer_rows

FRACTIONS = [(9, 10), (1, 2), (99, 100), (2, 3), (65535, 65536), (1, 65536), (937, 1000)]


def to_words(values):
    values = [value % 2**64 for value in values]
    hi = np.array([value >> 32 for value in values], np.uint32)
    return fixed.Words(jnp.asarray(hi), jnp.asarray(np.array([value & 0xFFFFFFFF for value in values], np.uint32)))


def to_ints(words):
    values = [int(hi) << 32 | int(lo) for hi, lo in zip(words.hi, words.lo)]
    return [value - 2**64 if value >= 2**63 else value for value in values]


def some_integers():
    edges = [s * (1 << k) + e for k in range(0, 63, 5) for s in (1, -1) for e in (-1, 0, 1)]
    edges += [2**63 - 1, -(2**63), -(2**63) + 1, 0xFFFFFFFF, 0xFFFFFFFF << 16, -0x10000, 2**32, -(2**32)]
    return edges + [int(v) for v in np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 400)]


@pytest.mark.parametrize(("n", "d"), FRACTIONS)
def test_product_with_a_fraction_is_pythons_and_is_invertible(n, d):
    values = some_integers()
    rng = np.random.default_rng(n)
    stores = [int(s) for s in rng.integers(0, 2**32 // d, len(values))]
    stores[:2] = [0, 2**32 // d - 1]
    expected = []
    for value, store in zip(values, stores):
        quotient, rest = divmod(value, d)
        store, digit = divmod(store * d + rest, n)
        expected.append((quotient * n + digit, store))
        assert abs(Fraction(value * n, d) - expected[-1][0]) < n
    words, kept = to_words(values), jnp.asarray(stores, jnp.uint32)
    product, store = fixed.multiply_rational(words, kept, n, d)
    assert to_ints(product) == [value for value, _ in expected]
    assert [int(s) for s in store] == [s for _, s in expected]
    back, emptied = fixed.multiply_rational(product, store, d, n)
    assert to_ints(back) == values
    assert [int(s) for s in emptied] == stores


def test_sums_are_pythons_and_say_when_they_wrap():
    left = some_integers()
    right = left[::-1]
    total = fixed.add(to_words(left), to_words(right))
    wide = [a + b for a, b in zip(left, right)]
    assert to_ints(total) == [(v + 2**63) % 2**64 - 2**63 for v in wide]
    flags = fixed.wrapped(to_words(left), to_words(right), total)
    assert [bool(f) for f in flags] == [not -(2**63) <= v < 2**63 for v in wide]
    assert to_ints(fixed.negate(to_words(left))) == [(-v + 2**63) % 2**64 - 2**63 for v in left]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [30, 44, 52])
def test_floats_become_integers_and_return(dtype, bits):
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(1)
        values = (rng.normal(size=500) * 2.0 ** rng.integers(-60, 64 - bits - 3, 500)).astype(dtype)
        top = np.nextafter(dtype(2.0 ** (63 - bits)), dtype(0))
        values = np.concatenate([values, np.array([0.0, -0.0, 1.0, -1.0, 2.0**-bits, -(2.0**-bits), top, -top], dtype)])
        encode = jax.jit(fixed.encode, static_argnums=1)
        words, bad = encode(jnp.asarray(values), bits)
        assert to_ints(words) == [int(Fraction(float(v)) * 2**bits) for v in values]  # int() rounds towards zero
        assert not bad.any()
        back = np.asarray(jax.jit(fixed.decode, static_argnums=(1, 2))(words, bits, dtype))
        assert back.dtype == dtype
        coarse = np.abs(values.astype(np.float64) - back)
        assert (coarse <= 2.0**-bits).all()
        fine = np.abs(values) >= dtype(2.0 ** (np.finfo(dtype).nmant - bits))
        np.testing.assert_array_equal(back[fine], values[fine])
        wild = jnp.asarray(np.array([np.nan, np.inf, -np.inf, 2.0 ** (63 - bits), -1e30], dtype))
        assert encode(wild, bits)[1].all()


@pytest.mark.parametrize(("n", "d"), FRACTIONS)
def test_the_store_never_overflows_and_the_buffer_has_the_promised_size(n, d):
    steps = 3000
    spill = fixed.spill_schedule(n, d, steps)
    for rest in (d - 1, 0, d // 2):  # the largest remainders, and others
        store = 0
        for drop in spill:
            store = store >> 16 if drop else store
            assert store * d + rest < 2**32
            store = (store * d + rest) // n
    needed = steps * np.log2(d / n) / 16
    assert needed - 2 <= spill.sum() <= 1.02 * needed + 1
    assert buffer_rows(Fraction(n, d), steps) == spill.sum()
