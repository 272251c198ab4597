"""Every trainer against central differences of retraining, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, loop, losses, threat, tree
from tests import oracles, problems

STEPS = 30
MOMENTUM = optax.sgd(0.5, momentum=0.9)


def trainers(problem):
    loss_fn = problem.loss_fn
    objective = losses.regularised(loss_fn, l2=0.1, penalise=None)
    back = lambda **options: bilevel.back_gradient(loss_fn, 0.5, STEPS, **options)
    dp = bilevel.dp_gradient(clip_norm=0.5, noise_multiplier=0.1, batch_size=5)
    return {
        "unrolled_none": bilevel.unrolled(loss_fn, MOMENTUM, STEPS),
        "unrolled_step": bilevel.unrolled(loss_fn, MOMENTUM, STEPS, remat="step"),
        "unrolled_sqrt": bilevel.unrolled(loss_fn, MOMENTUM, STEPS, remat="sqrt"),
        "unrolled_log": bilevel.unrolled(loss_fn, MOMENTUM, STEPS, remat="log"),
        "unrolled_adam_batches": bilevel.unrolled(loss_fn, optax.adam(0.05), STEPS, batching=loop.shuffled(4)),
        "unrolled_dp": bilevel.unrolled(
            loss_fn, optax.sgd(0.5), STEPS, batching=loop.poisson(0.4, 14), grad_fn=dp
        ),
        "stored": back(momentum=0.9),
        "exact": back(momentum=0.9, reversal="exact"),
        "exact_batches": back(momentum=0.5, reversal="exact", batching=loop.shuffled(4)),
        "fixed_point": back(reversal="fixed_point"),
        "forward": bilevel.forward(loss_fn, MOMENTUM, STEPS, rows=2),
        "implicit_cholesky": bilevel.implicit(objective),
        "implicit_cg": bilevel.implicit(objective, linear_solve=bilevel.cg()),
        "implicit_normal_cg": bilevel.implicit(objective, linear_solve=bilevel.normal_cg(tolerance=1e-13)),
        "implicit_gmres": bilevel.implicit(objective, linear_solve=bilevel.gmres()),
        "implicit_lu": bilevel.implicit(objective, linear_solve=bilevel.lu()),
        "implicit_neumann": bilevel.implicit(objective, linear_solve=bilevel.neumann(600, scale=1.0)),
        "implicit_nystrom": bilevel.implicit(objective, linear_solve=bilevel.nystrom(15, damping=1e-10)),
    }


NAMES = list(trainers(problems.make()))


def attack_loss(trainer, problem):
    reach = threat.append_rows(problems.POISONS)
    outer = losses.goal_loss(problem.loss_fn)

    @jax.jit
    def value(poison):
        data = reach.embed(poison, problem.train)
        return outer(trainer(jax.random.key(1), problem.params, data)[0], data, problem.known.goal)

    return value, reach.init(jax.random.key(0), problem.train)


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_central_differences(name, x64):
    problem = problems.make(jnp.float64)
    value, poison = attack_loss(trainers(problem)[name], problem)
    limit = {"fixed_point": 1e-4, "implicit_nystrom": 1e-4}.get(name, 1e-6)
    assert oracles.relative_error(value, poison) <= limit


@pytest.mark.parametrize("l1,l2", [(0.03, 0.0), (0.02, 0.05)])
def test_sparse_regression_agrees_on_its_active_set(l1, l2, x64):
    problem = problems.make(jnp.float64)
    loss_fn = losses.squared(lambda params, x, key=None: x @ params["w"] + params["b"])
    data = problem.train._replace(y=problem.train.x[:, 0] - 0.5 * problem.train.x[:, 1])
    params = {"w": jnp.zeros(problems.DIM), "b": jnp.zeros(())}
    trainer = bilevel.implicit(losses.regularised(loss_fn, l1=l1, l2=l2))
    trained, info = jax.jit(trainer)(jax.random.key(0), params, data)
    assert 0 < int(jnp.sum(trained["w"] == 0)) < problems.DIM
    assert float(info["stationarity"]) < 1e-12
    whole = losses.empirical(loss_fn)(trained, data) + l1 * jnp.abs(trained["w"]).sum() + l2 / 2 * (trained["w"] ** 2).sum()
    np.testing.assert_allclose(info["objective"], whole, rtol=1e-12)
    value = lambda x: losses.empirical(loss_fn)(
        trainer(jax.random.key(0), params, data._replace(x=x, weight=jnp.ones(data.num_rows)))[0], data._replace(y=data.y + 1)
    )
    assert oracles.relative_error(jax.jit(value), data.x) <= 1e-6


@pytest.mark.parametrize("name", ["l2", "closure", "l1"])
def test_implicit_differentiates_what_its_objective_closes_over(name, x64):
    problem = problems.make(jnp.float64)
    apply = lambda params, x, key=None: x @ params["w"] + params["b"]
    data = problem.train._replace(y=problem.train.x[:, 0] - 0.5 * problem.train.x[:, 1])
    params = {"w": jnp.zeros(problems.DIM), "b": jnp.zeros(())}
    outer = losses.empirical(losses.squared(apply))

    @jax.jit
    def value(number):
        objective = {
            "l2": lambda: losses.regularised(losses.squared(apply), l2=number, penalise=None),
            "closure": lambda: losses.regularised(losses.squared(lambda p, x, key=None: apply(p, number * x)), l2=0.1),
            "l1": lambda: losses.regularised(losses.squared(apply), l1=number, l2=0.05),
        }[name]()
        return outer(bilevel.implicit(objective)(jax.random.key(0), params, data)[0], data._replace(y=data.y + 1))

    numbers = jnp.array([0.02, 0.03])
    slopes = jax.jit(jax.vmap(jax.grad(value)))(numbers)
    expected = [float(value(x + 1e-6) - value(x - 1e-6)) / 2e-6 for x in numbers]
    np.testing.assert_allclose(slopes, expected, rtol=1e-6)


def test_ridge_has_the_closed_form(x64):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 3)), rng.normal(size=20)
    loss_fn = losses.squared(lambda params, x, key=None: x @ params["w"])
    trainer = bilevel.implicit(losses.regularised(loss_fn, l2=0.3))
    trained, _ = trainer(jax.random.key(0), {"w": jnp.zeros(3)}, mj.dataset(x, y))
    expected = np.linalg.solve(x.T @ x / 20 + 0.3 * np.eye(3), x.T @ y / 20)
    np.testing.assert_allclose(trained["w"], expected, rtol=1e-10)


def test_truncated_with_all_steps_is_unrolled_and_with_fewer_is_not(x64):
    problem = problems.make(jnp.float64)
    gradient = {}
    for last in (2, STEPS):
        value, poison = attack_loss(bilevel.truncated(problem.loss_fn, MOMENTUM, STEPS, last=last), problem)
        gradient[last] = jax.grad(value)(poison)
    value, poison = attack_loss(bilevel.unrolled(problem.loss_fn, MOMENTUM, STEPS), problem)
    full = jax.grad(value)(poison)
    assert oracles.trees_close(gradient[STEPS], full, rtol=1e-12, atol=0)
    assert 0.0 < float(jnp.linalg.norm(gradient[2])) < 0.9 * float(jnp.linalg.norm(full))


def test_only_trainable_leaves_move_and_are_differentiated(x64):
    problem = problems.make(jnp.float64)
    params = {**problem.params, "b": jnp.asarray([0.3, -0.1, 0.2])}
    objective = losses.regularised(problem.loss_fn, l2=0.1)
    only_w = lambda path, leaf: path == "w"
    for trainer in (
        bilevel.implicit(objective, trainable=only_w),
        bilevel.back_gradient(problem.loss_fn, 0.5, STEPS, momentum=0.9, reversal="exact", trainable=only_w),
        bilevel.back_gradient(problem.loss_fn, 0.5, STEPS, reversal="fixed_point", trainable=only_w),
        bilevel.unrolled(problem.loss_fn, MOMENTUM, STEPS, trainable=only_w),
    ):
        trained, _ = jax.jit(trainer.fit)(jax.random.key(0), params, problem.train)
        assert oracles.trees_equal(trained["b"], params["b"])
        assert not oracles.trees_equal(trained["w"], params["w"])
        value, poison = attack_loss(trainer, problem._replace(params=params))
        assert oracles.relative_error(value, poison) <= 1e-6


@pytest.mark.parametrize("why", ["no steps", "nothing trainable", "no params"])
@pytest.mark.parametrize("reversal", ["stored", "approximate", "fixed_point", "exact"])
def test_training_that_moves_nothing_gives_the_start_back(reversal, why):
    problem = problems.make()
    params = {} if why == "no params" else {**problem.params, "b": jnp.asarray([0.3, -0.1, 0.2])}
    trainer = bilevel.back_gradient(
        problem.loss_fn if params else lambda params, data, key=None: data.x[:, 0],
        0.5,
        0 if why == "no steps" else 3,
        momentum=0.9 if reversal == "exact" else 0.0,
        reversal=reversal,
        trainable=None if why == "no steps" else lambda path, leaf: False,
    )
    trained, info = trainer(jax.random.key(0), params, problem.train)
    assert oracles.trees_equal(trained, params)
    assert set(info) == ({"loss", "overflow"} if reversal == "exact" else {"loss"}) and bool(jnp.isfinite(info["loss"]))
    square = lambda start, x: tree.dot(*2 * [trainer(jax.random.key(0), start, problem.train._replace(x=x))[0]])
    slopes = jax.grad(square, argnums=(0, 1))(params, problem.train.x)
    assert oracles.trees_equal(slopes, (jax.tree.map(lambda leaf: 2 * leaf, params), jnp.zeros_like(problem.train.x)))
    assert all(float(v) == 0 for v in trainer.probe(jax.random.key(0), params, problem.train, params).values())


def test_approximate_reversal_keeps_the_direction_but_not_the_path(x64):
    problem = problems.make(jnp.float64)
    trainer = bilevel.back_gradient(problem.loss_fn, 0.1, STEPS, reversal="approximate")
    data = threat.append_rows(2).embed(problem.train.x[-2:], problem.train)
    ask = lambda data, rows: bilevel.diagnose(
        trainer,
        jax.random.key(0),
        problem.params,
        data,
        outer=losses.goal_loss(problem.loss_fn),
        goal=problem.known.goal,
        rows=rows,
    )
    report = jax.jit(ask, static_argnums=1)(data, 2)
    with pytest.raises(ValueError, match=r"^rows: expected rows of the data"):
        ask(data, [14])
    assert float(report["cosine"]) > 0.999
    assert float(report["drift"]) > 1e-4


def test_forward_marks_what_it_did_not_differentiate(x64):
    problem = problems.make(jnp.float64)
    trainer = bilevel.forward(problem.loss_fn, MOMENTUM, 3, rows=2)
    value = lambda x: losses.empirical(problem.loss_fn)(
        trainer(jax.random.key(0), problem.params, problem.train._replace(x=x))[0], problem.known.goal
    )
    gradient = jax.grad(value)(problem.train.x)
    assert bool(jnp.all(jnp.isnan(gradient[:-2]))) and bool(jnp.all(jnp.isfinite(gradient[-2:])))


def test_forward_takes_a_traced_learning_rate_and_marks_its_derivative(x64):
    problem = problems.make(jnp.float64)

    def slope(rate):
        value, poison = attack_loss(bilevel.forward(problem.loss_fn, optax.sgd(rate), 3, rows=2), problem)
        return jax.grad(value)(poison)

    swept = jax.jit(jax.vmap(slope))(jnp.array([0.1, 0.5]))
    np.testing.assert_allclose(swept, jnp.stack([slope(0.1), slope(0.5)]), rtol=1e-10)
    trained = lambda rate: bilevel.forward(problem.loss_fn, optax.sgd(rate), 3, rows=2)(
        jax.random.key(0), problem.params, problem.train
    )[0]
    assert bool(jnp.isnan(jax.jit(jax.grad(lambda rate: jnp.sum(trained(rate)["b"] ** 2)))(0.1)))


def test_forward_counts_its_last_rows_and_refuses_others():
    problem = problems.make()

    def touched(rows):
        trainer = bilevel.forward(problem.loss_fn, MOMENTUM, 1, rows=rows)
        fit = lambda x: jnp.sum(trainer(jax.random.key(0), problem.params, problem.train._replace(x=x))[0]["b"])
        return np.flatnonzero(np.isfinite(jax.grad(fit)(problem.train.x)).all(axis=1)).tolist()

    assert touched(np.int64(2)) == [12, 13] and touched([0, 5]) == [0, 5] and touched([]) == []
    for rows in (99, [99]):
        with pytest.raises(ValueError, match=r"^rows: expected"):
            touched(rows)


def test_diagnose_sees_an_active_set_change(x64):
    loss_fn = losses.squared(lambda params, x, key=None: x @ params["w"])
    data = mj.dataset(jnp.ones((2, 1)), jnp.full(2, 0.5))

    @jax.jit
    def report(l1):
        trainer = bilevel.implicit(
            losses.regularised(loss_fn, l1=l1), solver=bilevel.proximal_gradient(num_steps=200)
        )
        outer = lambda params, data, goal: jnp.sum(params["w"])
        start = {"w": jnp.ones(1)}
        return bilevel.diagnose(
            trainer, jax.random.key(0), start, data, outer=outer, goal=None, rows=jnp.array([0]), num_directions=2
        )

    assert bool(report(0.5 - 1e-7)["crossed"])  # just active: w = 1e-7, so a difference of 1e-5 crosses
    calm = report(0.1)
    assert not bool(calm["crossed"]) and float(calm["rel_error"]) < 1e-6


@pytest.mark.parametrize("name", ["unrolled_sqrt", "exact", "implicit_cholesky", "fixed_point", "forward"])
def test_vmap_over_learning_problems_is_a_loop(name):
    batch = [problems.make(seed=seed) for seed in range(2)]
    trainer = trainers(batch[0])[name]
    gradient = jax.grad(
        lambda x, train: jnp.sum(
            trainer(jax.random.key(0), batch[0].params, threat.append_rows(2).embed(x, train))[0]["w"] ** 2
        )
    )
    trains = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[p.train for p in batch])
    together = jax.jit(jax.vmap(gradient))(trains.x[:, -2:], trains)
    alone = jax.jit(gradient)
    for k, problem in enumerate(batch):
        one = alone(problem.train.x[-2:], problem.train)
        np.testing.assert_allclose(together[k], one, rtol=2e-3, atol=1e-5)


def test_any_parameter_pytree(x64):
    from typing import NamedTuple

    class Affine(NamedTuple):
        w: jax.Array
        b: jax.Array

    problem = problems.make(jnp.float64)
    loss_fn = losses.cross_entropy(lambda params, x, key=None: x @ params[0].w + params[0].b[None])
    params = [Affine(problem.params["w"], problem.params["b"])]
    train = jax.jit(bilevel.back_gradient(loss_fn, 0.5, 5, momentum=0.9, reversal="exact").fit)
    trained, _ = train(jax.random.key(0), params, problem.train)
    same = bilevel.unrolled(problem.loss_fn, MOMENTUM, 5)
    expected, _ = same(jax.random.key(0), problem.params, problem.train)
    np.testing.assert_allclose(trained[0].w, expected["w"], rtol=1e-9)
    assert float(tree.norm(trained)) > 0


def test_clipping_is_exact_and_absent_rows_do_not_count(x64):
    problem = problems.make(jnp.float64)
    grad_fn = bilevel.dp_gradient(clip_norm=0.2, noise_multiplier=0.0, batch_size=10.0, chunk=5)
    params = jax.tree.map(lambda leaf: leaf + 0.3, problem.params)
    ours = grad_fn(jax.random.key(0), problem.loss_fn, params, problem.train)
    expected = jax.tree.map(jnp.zeros_like, params)
    for row in range(problem.train.num_rows - problems.POISONS):  # the reserved rows weigh 0
        one = tree.take(problem.train, jnp.array([row]))
        gradient = jax.grad(lambda p, one=one: problem.loss_fn(p, one)[0])(params)
        factor = min(1.0, 0.2 / float(tree.norm(gradient)))
        expected = tree.add_scaled(expected, factor / 10.0, gradient)
    assert oracles.trees_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_noise_has_the_stated_scale():
    loss_fn = lambda params, data, key=None: 0.0 * params["w"][0] + data.x[:, 0] * 0
    grad_fn = bilevel.dp_gradient(clip_norm=2.0, noise_multiplier=3.0, batch_size=4.0)
    data = mj.dataset(jnp.ones((4, 1)), jnp.zeros(4, jnp.int32))
    noise = grad_fn(jax.random.key(0), loss_fn, {"w": jnp.zeros(20_000)}, data)["w"]
    assert abs(float(jnp.std(noise)) - 2.0 * 3.0 / 4.0) < 5 * 1.5 / np.sqrt(2 * 20_000)


def test_poisson_batches_have_the_stated_rate():
    schedule = loop.poisson(0.3, 100)(jax.random.key(0), 100, 400)
    counts = np.asarray(schedule.mask.sum(axis=1))
    assert abs(counts.mean() - 30) < 5 * np.sqrt(21 / 400)
    assert abs(counts.var() - 21) < 5
    assert all(len(set(rows)) == 100 for rows in np.asarray(schedule.rows)[:3])


@pytest.mark.parametrize(
    "call",
    [
        lambda f: bilevel.back_gradient(f, 0.1, 5, momentum=0.9, reversal="fixed_point"),
        lambda f: bilevel.back_gradient(f, 0.1, 5, reversal="exact"),
        lambda f: bilevel.back_gradient(f, 0.1, 5, momentum=1.0, reversal="exact"),
        lambda f: bilevel.back_gradient(f, 0.1, 5, momentum=0.9 + 1e-7, reversal="exact"),
        lambda f: jax.jit(lambda m: bilevel.back_gradient(f, 0.1, 5, momentum=m) and m)(0.9),
        lambda f: bilevel.back_gradient(f, -0.1, 5),
        lambda f: bilevel.back_gradient(f, jnp.nan, 5, reversal="fixed_point"),
        lambda f: losses.regularised(f, l2=-0.1),
        lambda f: losses.regularised(f, l1=-0.1),
        lambda f: bilevel.back_gradient(f, 0.1, 5, reversal="magic"),
        lambda f: bilevel.unrolled(f, MOMENTUM, -1),
        lambda f: bilevel.unrolled(f, MOMENTUM, 5, remat="cube"),
        lambda f: bilevel.truncated(f, MOMENTUM, 5, last=6),
        lambda f: bilevel.dp_gradient(clip_norm=0.0, noise_multiplier=1.0, batch_size=1),
        lambda f: loop.shuffled(0),
    ],
)
def test_bad_hyperparameters_are_named(call):
    with pytest.raises(ValueError, match=r"^[a-z0-9_]+: "):
        call(problems.make().loss_fn)


@pytest.mark.parametrize("linear_solve", [None, bilevel.cg(tolerance=1e-14)])
def test_implicit_by_default_bears_biases_that_may_all_move_together(x64, linear_solve):
    problem = problems.make(jnp.float64)
    trainer = bilevel.implicit(losses.regularised(problem.loss_fn, l2=0.1), linear_solve=linear_solve)
    loss = losses.empirical(problem.loss_fn)
    goal = problem.known.goal
    value = jax.jit(lambda x: loss(trainer(jax.random.key(0), problem.params, problem.train._replace(x=x))[0], goal))
    x = problem.train.x
    direction = jax.random.normal(jax.random.key(1), x.shape, x.dtype)
    slope = jnp.vdot(jax.jit(jax.grad(value))(x), direction)
    step = 1e-5
    np.testing.assert_allclose(slope, (value(x + step * direction) - value(x - step * direction)) / (2 * step), rtol=1e-6)
