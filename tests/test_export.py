"""Programs lower for every backend from a machine that has none of them."""

import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, models, threat, tree
from tests import problems

PLATFORMS = ("cuda", "tpu", "cpu")


def lowers_everywhere(fn, *args):
    """Lowers `jit(fn)` for every backend at once, and returns the export (`.call(*args)` runs it here).

    It raises where an operation has no lowering rule for one of them, or where a custom call would not be stable.
    """
    exported = jax.export.export(jax.jit(fn), platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS
    return exported


def training(params, x, y):
    """A scan of gradient steps, and the derivative of its outcome with respect to the data."""

    def outer(x):
        loss = lambda params: jnp.mean(jnp.square(jnp.tanh(x @ params["a"]) @ params["b"] - y))
        step = lambda params, _: (jax.tree.map(lambda p, g: p - 0.1 * g, params, jax.grad(loss)(params)), loss(params))
        return jax.lax.scan(step, params, length=3)[1][-1]

    return jax.value_and_grad(outer)(x)


def test_training_by_gradients_in_a_scan():
    params = {"a": jnp.ones((3, 4)) / 3, "b": jnp.ones(4) / 4}
    args = (params, jnp.sin(jnp.arange(15.0)).reshape(5, 3), jnp.arange(5.0) / 5)
    value, grad = lowers_everywhere(training, *args).call(*args)
    expected_value, expected_grad = jax.jit(training)(*args)
    assert jnp.allclose(value, expected_value)
    assert jnp.allclose(grad, expected_grad, atol=1e-6)
    assert jnp.abs(grad).max() > 1e-3


def test_it_refuses_what_one_backend_lacks():
    schur = lambda a: jax.scipy.linalg.schur(a)[0]  # LAPACK only
    with pytest.raises(NotImplementedError, match=r"cuda|tpu"):
        lowers_everywhere(schur, jnp.eye(3))


def test_the_main_operations_lower_for_every_platform():
    problem = problems.make()
    model = models.lenet(channels=(2, 2), widths=(4,), kernel=3, num_classes=3)
    images = jnp.zeros((4, 12, 12, 1))
    params = model.init(jax.random.key(0), images)
    deep = losses.cross_entropy(model.apply)
    trainers = [
        (bilevel.back_gradient(problem.loss_fn, 0.1, 3, momentum=0.5, reversal="exact"), problem.params, problem.train),
        (bilevel.implicit(losses.regularised(problem.loss_fn, l2=0.1, penalise=None)), problem.params, problem.train),
        (bilevel.unrolled(deep, optax.sgd(0.1), 3, remat="sqrt"), params, mj.dataset(images, jnp.arange(4) % 3)),
    ]
    for trainer, start, data in trainers:

        def gradient(x, start=start, data=data, trainer=trainer):
            value = lambda x: tree.norm(trainer(jax.random.key(0), start, data._replace(x=x))[0])
            return jax.grad(value)(x)

        lowers_everywhere(gradient, data.x)
    attack = attacks.error_specific(
        problem.loss_fn,
        bilevel.unrolled(problem.loss_fn, optax.sgd(0.1), 3),
        threat=threat.append_rows(problem.reserved),
        optimizer=optax.adam(0.1),
    )
    run = lambda train, known: combine.run(attack, jax.random.key(0), train, known, num_steps=2)[0]
    lowers_everywhere(run, problem.train, problem.known)
