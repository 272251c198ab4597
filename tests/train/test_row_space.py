"""Training in the rows' span makes the same steps as training on the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, loop, losses, train

KEY = jax.random.key(0)


def network(params, x, key=None):
    return jax.nn.relu(x @ params["in"]["w"] + params["in"]["b"][None]) @ params["out"]


def make(n=9, d=40):
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]))
    params = {"in": {"w": normal(d, 6), "b": normal(6)}, "out": normal(6, 3)}
    x = rng.normal(size=(n, d))
    x[4] = x[3]  # dependent rows
    weight = np.ones(n)
    weight[7] = 0  # and an absent one
    return params, mj.dataset(jnp.asarray(x), jnp.asarray(np.arange(n) % 3, jnp.int32), jnp.asarray(weight))


@pytest.mark.parametrize("shape", [(9, 40), (40, 9)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("batching", [loop.full_batch, loop.shuffled(3)], ids=["full", "batches"])
@pytest.mark.slow
def test_the_steps_are_the_same(shape, batching):
    with jax.enable_x64(True):
        params, data = make(*shape)
        trainer = bilevel.unrolled(losses.cross_entropy(network), optax.sgd(0.3, momentum=0.9, nesterov=True), 25,
                                   batching=batching)  # fmt: skip
        fast = train.row_space(trainer, lambda path, leaf: path == "in/w")
        (plain, info), (quick, quick_info) = trainer(KEY, params, data), jax.jit(fast)(KEY, params, data)
        for a, b in zip(jax.tree.leaves((plain, info)), jax.tree.leaves((quick, quick_info))):
            np.testing.assert_allclose(a, b, atol=1e-10)
        assert float(jnp.max(jnp.abs(plain["in"]["w"] - params["in"]["w"]))) > 0.01


def test_a_penalty_is_that_of_the_whole_when_it_starts_at_zero():
    with jax.enable_x64(True):
        params, data = make()
        params = {**params, "in": {"w": jnp.zeros_like(params["in"]["w"]), "b": params["in"]["b"] + 1}}
        trainer = bilevel.unrolled(losses.cross_entropy(network), optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1)), 20)
        fast = train.row_space(trainer, lambda path, leaf: path == "in/w")
        np.testing.assert_allclose(trainer(KEY, params, data)[0]["in"]["w"], fast(KEY, params, data)[0]["in"]["w"], atol=1e-10)


def test_labels_can_be_differentiated_and_inputs_say_that_they_cannot():
    with jax.enable_x64(True):
        params, data = make()
        trainer = bilevel.unrolled(losses.cross_entropy(network), optax.sgd(0.3), 5)
        fast = train.row_space(trainer, lambda path, leaf: path == "in/w")
        soft = losses.soft_labels(data.y, 3, jnp.float64)
        total = lambda fit: jax.grad(lambda y: jnp.sum(fit(KEY, params, data._replace(y=y))[0]["in"]["w"] ** 2))(soft)
        np.testing.assert_allclose(total(trainer), total(fast), atol=1e-10)
        with pytest.raises(ValueError, match="inputs cannot be differentiated"):
            jax.grad(lambda x: jnp.sum(fast(KEY, params, data._replace(x=x))[0]["out"]))(data.x)


def test_bad_input_is_named():
    params, data = make()
    trainer = bilevel.unrolled(losses.cross_entropy(network), optax.sgd(0.3), 1)
    with pytest.raises(ValueError, match="where"):
        train.row_space(trainer, lambda path, leaf: path == "out")(KEY, params, data)
