"""What losses make of labels and weights of other kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import losses

linear = lambda params, x, key=None: x @ params


def test_real_labels_of_a_row_are_no_classes():
    rows = mj.dataset(jnp.ones((2, 3)), jnp.array([0.0, 1.0]))  # two rows and two classes: shapes alone would pass
    with pytest.raises(ValueError, match=r"data.y: expected integer labels \[n\] or soft ones \[n, c\], got float32"):
        losses.cross_entropy(linear)(jnp.ones((3, 2)), rows)


def test_counts_and_flags_are_averaged_by_weights_of_any_kind():
    np.testing.assert_allclose(losses.weighted_mean(jnp.array([1, 0, 1]), jnp.array([0.5, 0.5, 0.5])), 2 / 3, rtol=1e-6)
    flags, weight = jnp.array([True, False, True]), jnp.array([2.0, 1.0, 0.5])
    np.testing.assert_allclose(losses.weighted_mean(flags, weight), 2.5 / 3.5, rtol=1e-6)
    np.testing.assert_allclose(losses.weighted_mean(flags, jnp.array([1, 1, 0])), 0.5)


@pytest.mark.parametrize("make", [losses.logistic, losses.hinge])
def test_traced_labels_that_are_not_binary_cost_nan(make):
    rows = lambda y: mj.dataset(jnp.ones((3, 2)), y)
    cost = jax.jit(lambda y: make(linear)(jnp.ones(2), rows(y)))
    np.testing.assert_array_equal(np.isnan(cost(jnp.array([0, 1, 5]))), [False, False, True])
    assert np.isfinite(cost(jnp.array([-1, 1, 1]))).all()


def test_a_hinge_has_no_negative_temperature():
    with pytest.raises(ValueError, match="temperature: expected at least 0"):
        losses.hinge(linear, temperature=-1.0)
    zero = losses.hinge(linear, temperature=np.float32(0))(jnp.ones(2), mj.dataset(jnp.ones((1, 2)), jnp.array([0])))
    np.testing.assert_array_equal(zero, [3.0])


def test_biases_of_every_library_are_biases():
    names = ["b", "head/b", "params/bias", "params/bias/value"]
    assert not any(losses.not_bias(name, None) for name in names)
    assert all(losses.not_bias(name, None) for name in ["w", "params/kernel/value", "value"])


@pytest.mark.parametrize("make", [losses.cross_entropy, losses.margin])
def test_a_traced_label_that_is_no_class_makes_the_gradient_nan(make):
    x = jnp.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])
    slope = jax.jit(jax.grad(lambda w, y, weight: losses.empirical(make(linear))(w, mj.dataset(x, y, weight))))
    bad, w = jnp.array([0, 1, 9]), jnp.ones((2, 3))
    assert np.isnan(slope(w, bad, jnp.ones(3))).all()
    absent = slope(w, bad, jnp.array([1.0, 1.0, 0.0]))
    np.testing.assert_allclose(absent, slope(w, jnp.array([0, 1, 2]), jnp.array([1.0, 1.0, 0.0])))
    assert np.isfinite(absent).all()


@pytest.mark.parametrize("y", [jnp.array([0.0, 1.5, 2.0]), jnp.eye(3)])
def test_a_margin_is_of_integer_labels(y):
    with pytest.raises(ValueError, match=r"data.y: expected integer labels \[n\], got float32"):
        losses.margin(linear)(jnp.eye(3), mj.dataset(jnp.eye(3), y))
