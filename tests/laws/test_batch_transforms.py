"""The laws of transforms of batches, for `defended(during=...)`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlsec_jax import losses
from tests import oracles, problems, registry

ROWS = registry.of("batch")
by_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
KEY = jax.random.key(2)


def batch_of(row, weight=None):
    """The problem's rows, all present or of the given weights."""
    batch = row.problem(problems.make()).train
    return batch._replace(weight=jnp.ones_like(batch.weight) if weight is None else weight)


def soft(batch):
    return batch._replace(y=losses.soft_labels(batch.y, problems.CLASSES, batch.weight.dtype))


@by_row
def test_same_bits_no_retrace_shapes_kept_and_labels_are_distributions(row):
    batch = batch_of(row)
    transform = row.build(None, row.budget)
    jitted = jax.jit(transform)
    changed = jitted(KEY, batch)
    jitted(jax.random.key(3), batch._replace(x=batch.x / 2))
    assert jitted._cache_size() == 1
    assert oracles.trees_equal(changed, jitted(KEY, batch))
    assert oracles.trees_close(changed, transform(KEY, batch))
    assert not oracles.trees_equal(changed.x, batch.x)
    for new, old in ((changed.x, batch.x), (changed.weight, batch.weight)):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    label = soft(changed).y
    assert label.shape == (batch.num_rows, problems.CLASSES) and float(jnp.min(label)) >= 0
    np.testing.assert_allclose(jnp.sum(label, axis=1), 1, rtol=1e-5)
    again = transform(KEY, soft(batch))
    assert oracles.trees_close(soft(changed), again)


@by_row
def test_vmap_over_keys_is_a_loop(row):
    batch, transform = batch_of(row), row.build(None, row.budget)
    keys = jax.random.split(KEY, 3)
    together = jax.jit(jax.vmap(transform, in_axes=(0, None)))(keys, batch)
    for k in range(3):
        assert oracles.trees_close(jax.tree.map(lambda leaf, k=k: leaf[k], together), transform(keys[k], batch))


@by_row
def test_what_counts_is_moved_never_made(row):
    batch = batch_of(row, jnp.linspace(0.5, 2, problems.NUM_ROWS + problems.POISONS))
    for k in range(5):
        changed = soft(row.build(None, row.budget)(jax.random.key(k), batch))
        np.testing.assert_allclose(jnp.sum(changed.weight), jnp.sum(batch.weight), rtol=1e-5)
        np.testing.assert_allclose(changed.weight @ changed.y, batch.weight @ soft(batch).y, rtol=1e-5)


@by_row
def test_weight_zero_is_absence_though_it_is_nan(row):
    transform, batch = jax.jit(row.build(None, row.budget)), batch_of(row)
    for k in range(5):
        alone = transform(jax.random.key(k), batch)
        padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:4]]), batch)
        last = jnp.arange(padded.num_rows) >= batch.num_rows
        padded = padded._replace(
            x=jnp.where(last[:, None].reshape(-1, *[1] * (padded.x.ndim - 1)), jnp.nan, padded.x),
            weight=jnp.where(last, 0, padded.weight),
        )
        beside = transform(jax.random.key(k), padded)
        kept = jax.tree.map(lambda leaf: leaf[: batch.num_rows], beside)
        # Two programs: an accelerator's compiler fuses them differently, and then their last bits may differ.
        rounding = 0 if jax.default_backend() == "cpu" else 1e-6
        assert oracles.trees_close(kept, alone, rtol=rounding, atol=rounding)
        assert not beside.weight[batch.num_rows :].any()


@by_row
def test_a_traced_hyperparameter_gives_the_same(row):
    batch = batch_of(row)
    traced = jax.jit(lambda budget: row.build(None, budget)(KEY, batch))(jnp.float32(row.budget))
    assert oracles.trees_close(traced, row.build(None, row.budget)(KEY, batch), rtol=1e-4, atol=1e-5)


@by_row
def test_nothing_to_do_is_the_identity(row):
    batch = batch_of(row, jnp.arange(problems.NUM_ROWS + problems.POISONS, dtype=jnp.float32))
    assert oracles.trees_equal(soft(row.zero(None)(KEY, batch)), soft(batch))
