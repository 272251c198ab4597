"""Label-flip smoothing: bounds against SciPy and all noise on toys, radii against every set of flips."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import mlsec_jax as mj
from mlsec_jax import defenses

KEY = jax.random.key(0)


def toy(n, classes, seed=0, dtype=jnp.float64, others=None):
    """Clusters, with `others` rows that are not of class 0: so few labels are certified only where most agree."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    y = y if others is None else np.where(np.arange(n) < n - others, 0, np.maximum(y, 1))
    x = rng.normal(size=(n, 2)) * 0.5 + 1.5 * np.eye(3, 2)[y]
    data = mj.dataset(jnp.asarray(x, dtype), jnp.asarray(y, jnp.int32))
    return data, jnp.asarray(rng.normal(size=(12, 2)) + 0.5, dtype)


def alphas(data, x, l2):
    """`[m, n]`, by normal equations with an explicit free intercept."""
    n = data.num_rows
    rows = np.concatenate([np.asarray(data.x), np.ones((n, 1))], axis=1)
    penalty = n * l2 * np.diag([1.0, 1.0, 0.0])
    tests = np.concatenate([np.asarray(x), np.ones((len(x), 1))], axis=1)
    return tests @ np.linalg.solve(rows.T @ rows + penalty, rows.T)


class Noise:
    """Every vector of labels, and what least squares says of each x under it: the smoothed classifier by summing."""

    def __init__(self, alpha, classes):
        n = alpha.shape[1]
        labels = np.array(list(itertools.product(range(classes), repeat=n)))
        self.hot = np.eye(classes)[labels].reshape(len(labels), -1)
        scores = np.stack([(labels == c) @ alpha.T for c in range(classes)], axis=-1)
        self.says = np.eye(classes)[scores.argmax(-1)].reshape(len(labels), -1)
        self.shape = (-1, len(alpha), classes)

    def shares(self, y, q):
        """The exact probability of each class where the labels are y `[., n]`: `[., m, classes]`."""
        n, classes = y.shape[1], self.shape[2]
        wrong = n - np.eye(classes)[y].reshape(len(y), -1) @ self.hot.T
        return ((1 - q) ** (n - wrong) * (q / (classes - 1)) ** wrong @ self.says).reshape(self.shape)


@pytest.mark.parametrize(
    "n, classes, others, q, l2, most", [(11, 2, 0, 0.05, 0.5, 1), (15, 2, 0, 0.05, 9.0, 2), (8, 3, 0, 0.05, 3.0, 1)]
)
def test_no_flips_within_the_radius_change_a_prediction(n, classes, others, q, l2, most):
    with jax.enable_x64(True):
        data, x = toy(n, classes, others=others)
        fit, predict = defenses.label_flip_smoothing(flip_rate=q, l2=l2, num_classes=classes)
        label, info = jax.jit(predict)(fit(KEY, None, data)[0], x)
    radius, error = np.asarray(info["radius"]), np.exp(np.asarray(info["log_error"]))
    alpha, y, label = alphas(data, x, l2), np.asarray(data.y), np.asarray(label)
    noise = Noise(alpha, classes)
    exact = noise.shares(y[None], q)[0]
    assert (1 - exact[np.arange(12), label] <= error + 1e-12).all()
    assert (exact.argmax(1) == label)[radius >= 0].all()
    checked = 0
    for r in range(1, most + 1):
        shifts = []
        for rows in itertools.combinations(range(n), r):
            for by in itertools.product(range(1, classes), repeat=r):
                shifts.append(np.zeros(n, int))
                shifts[-1][list(rows)] = by
        for part in np.array_split(np.array(shifts), -(-len(shifts) // 10)):
            stays = noise.shares((y[None] + part) % classes, q).argmax(-1) == label[None]
            assert stays[:, radius >= r].all()
            checked += stays[:, radius >= r].size
    assert radius.max() == most and checked > 10, (radius, checked)


def test_for_two_classes_bound_and_radius_are_the_papers():
    with jax.enable_x64(True):
        data, x = toy(30, 2, seed=1)
        q, l2 = 0.2, 0.1
        fit, predict = defenses.label_flip_smoothing(flip_rate=q, l2=l2, num_classes=2)
        label, info = predict(fit(KEY, None, data)[0], x)
        assert float(fit(KEY, None, data)[1]["objective"]) > 0
    alpha, y = alphas(data, x, l2), np.asarray(data.y)
    for k, a in enumerate(alpha):
        towards = y if int(label[k]) == 1 else 1 - y

        def exponent(t, a=a, towards=towards):
            kept, came = np.log((1 - q) * np.exp(-t * a) + q), np.log((1 - q) + q * np.exp(-t * a))
            return t / 2 + kept[towards == 1].sum() + came[towards == 0].sum()

        least = optimize.minimize_scalar(exponent, bounds=(0, 1e3), method="bounded", options={"xatol": 1e-9}).fun
        np.testing.assert_allclose(info["log_error"][k], min(least, 0), rtol=1e-6, atol=1e-9)
        p = 1 - np.exp(least)
        if p > 0.5:
            published = -np.log(4 * p * (1 - p)) / 2 / ((1 - 2 * q) * np.log((1 - q) / q))
            assert int(info["radius"][k]) == np.floor(published)
        else:
            assert int(info["radius"][k]) == -1


def test_probabilities_too_small_for_a_float_still_count():
    rng = np.random.default_rng(0)
    y = np.arange(4000) % 2
    x = 2.0 * y[:, None] - 1 + 0.1 * rng.normal(size=(4000, 1))
    data = mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    fit, predict = defenses.label_flip_smoothing(flip_rate=0.1, l2=1e-3, num_classes=2)
    label, info = jax.jit(predict)(fit(KEY, None, data)[0], jnp.array([[1.0], [-1.0]]))
    assert label.tolist() == [1, 0] and (np.asarray(info["log_error"]) < -200).all()
    assert (np.asarray(info["radius"]) > 100).all()


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="flip_rate"):
        defenses.label_flip_smoothing(flip_rate=0.5, l2=0.1, num_classes=2)
    with pytest.raises(ValueError, match="l2"):
        defenses.label_flip_smoothing(flip_rate=0.1, l2=0.0, num_classes=2)
    data, _ = toy(9, 3, dtype=jnp.float32)
    with pytest.raises(ValueError, match=r"labels in \[0, 2\)"):
        defenses.label_flip_smoothing(flip_rate=0.1, l2=0.1, num_classes=2)[0](KEY, None, data)
