"""The presets against scikit-learn, and the head against a full solve."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import linear_model

import mlsec_jax as mj
from mlsec_jax import losses, models, train
from tests import problems

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5))
Y = X @ np.array([1.0, 0.0, -0.5, 0.0, 0.2]) + 0.7 + 0.1 * RNG.normal(size=40)
KEY = jax.random.key(0)


def affine(params, x, key=None):
    return x @ params["w"] + params["b"]


def fit(trainer, y):
    params = {"w": jnp.zeros(5), "b": jnp.zeros(())}
    return jax.jit(trainer.fit)(KEY, params, mj.dataset(X, y))[0]


@pytest.mark.parametrize(
    "trainer,theirs",
    [
        (train.ridge(affine, l2=0.3), linear_model.Ridge(alpha=0.3 * 40)),
        (train.lasso(affine, l1=0.1), linear_model.Lasso(alpha=0.1, tol=1e-10)),
        (train.elastic_net(affine, l1=0.06, l2=0.04), linear_model.ElasticNet(alpha=0.1, l1_ratio=0.6, tol=1e-10)),
    ],
)
def test_regressions_are_scikit_learns(trainer, theirs, x64):
    ours = fit(trainer, Y)
    theirs.fit(X, Y)
    np.testing.assert_allclose(ours["w"], theirs.coef_, atol=1e-6)
    np.testing.assert_allclose(ours["b"], theirs.intercept_, atol=1e-6)


def test_logistic_regression_is_scikit_learns(x64):
    labels = (Y > 0.7).astype(np.int32)
    ours = fit(train.logistic_regression(affine, l2=0.05), labels)
    theirs = linear_model.LogisticRegression(C=1 / (40 * 0.05), tol=1e-12, max_iter=1000).fit(X, labels)
    np.testing.assert_allclose(ours["w"], theirs.coef_[0], atol=1e-5)
    np.testing.assert_allclose(ours["b"], theirs.intercept_[0], atol=1e-5)


def test_only_the_head_is_retrained(x64):
    problem = problems.make(jnp.float64)
    model = models.mlp(widths=(6,), num_classes=3)
    params = model.init(KEY, problem.train.x)
    trainer = train.fine_tuned_head(losses.cross_entropy(model.apply), l2=0.1)
    trained, info = jax.jit(trainer.fit)(KEY, params, problem.train)
    for name in params:
        same = jax.tree.all(jax.tree.map(jnp.array_equal, trained[name], params[name]))
        assert same == (name != "head")
    assert float(info["stationarity"]) < 1e-10


def test_scratch_learns_and_counts_its_steps():
    problem = problems.make()
    trainer = train.scratch(problem.loss_fn, num_epochs=10, batch_size=7, num_rows=14, learning_rate=0.5)
    _, info = jax.jit(trainer.fit)(KEY, problem.params, problem.train)
    assert float(info["loss"]) < 0.6
    with pytest.raises(ValueError, match="num_rows"):
        train.scratch(problem.loss_fn, num_epochs=1, batch_size=20, num_rows=14)


def test_scratch_takes_its_rates_as_operands():
    problem = problems.make()

    def fit(learning_rate, momentum, weight_decay):
        rates = dict(learning_rate=learning_rate, momentum=momentum, weight_decay=weight_decay)
        return train.scratch(problem.loss_fn, num_epochs=3, batch_size=7, num_rows=14, **rates)(
            KEY, problem.params, problem.train
        )[0]

    rates = (jnp.array([0.1, 0.5, 0.2]), jnp.array([0.9, 0.0, 0.5]), jnp.array([5e-4, 0.1, 0.0]))
    found = jax.jit(jax.vmap(fit))(*rates)
    for i, each in enumerate(zip(*(rate.tolist() for rate in rates))):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), found, fit(*each))


def test_a_start_is_drawn_from_the_key():
    def noisy(shift):
        fit = lambda key, start, data: (start + jax.random.normal(key) + shift(key, data).x.sum(), {})
        probe = lambda key, start, data, cotangent: {"start": start, "cotangent": cotangent}
        return mj.base.Trainer(fit, probe, noisy)

    data = problems.make().train
    init_fn = lambda key, x: jax.random.uniform(key) + x.shape[0]
    inner = noisy(lambda key, data: data)
    trainer = train.from_random(init_fn, inner)
    init_key, train_key = jax.random.split(KEY)
    start = init_fn(init_key, data.x[:1])
    assert trainer(KEY, None, data)[0] == inner(train_key, start, data)[0]
    assert trainer.probe(KEY, None, data, 7) == {"start": start, "cotangent": 7}
    shift = lambda key, data: data._replace(x=data.x + 1)
    assert trainer.batched(shift)(KEY, None, data)[0] == noisy(shift)(train_key, start, data)[0]
    assert train.from_random(init_fn, mj.base.Trainer(inner.fit)).batched is None
