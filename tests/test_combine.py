"""Run, chain, mask, restart, filter, defend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses, threat
from tests import oracles, problems

KEY = jax.random.key(0)


def distance(key, params, data, known):
    """Distance to the mean of the data: a scorer that needs no model."""
    shown = losses.present(data)
    mean = (data.weight @ shown.x) / jnp.sum(data.weight)
    return jnp.linalg.norm(shown.x - mean[None], axis=1)


def test_run_uses_one_key_a_step():
    draw = mj.Algorithm(
        init=lambda key, subject, known: jnp.zeros(()),
        step=lambda key, state, subject, known: (state + 1, jax.random.uniform(key)),
        read=lambda state, subject: state,
    )
    state, infos = combine.run(draw, KEY, None, mj.Known(), num_steps=3)
    _, step_key = jax.random.split(KEY)
    expected = [jax.random.uniform(jax.random.fold_in(step_key, k)) for k in range(3)]
    subject, same_infos = combine.iterate(draw, 3)(KEY, None, mj.Known())
    assert float(subject) == 3.0 and oracles.trees_equal(same_infos, infos)
    assert float(state) == 3.0 and oracles.trees_equal(infos, jnp.stack(expected))


def test_keep_best_reads_the_lowest_it_saw():
    values = jnp.array([3.0, 1.0, 2.0, jnp.nan, 5.0])
    walk = mj.Algorithm(
        init=lambda key, subject, known: jnp.zeros((), jnp.int32),
        step=lambda key, state, subject, known: (state + 1, {"outer": values[state]}),
        read=lambda state, subject: state,
    )
    best = combine.keep_best(walk)
    state, _ = combine.run(best, KEY, None, mj.Known(), num_steps=5)
    assert int(best.read(state, None)) == 1 and float(state.value) == 1.0


def test_masked_leaves_the_rest_alone():
    double = lambda key, subject, known: (jax.tree.map(lambda leaf: 2 * leaf, subject), {})
    tree = {"a": jnp.ones(2), "b": jnp.ones(2), "n": jnp.arange(2)}
    changed, _ = combine.masked(double, lambda path, leaf: path == "a")(KEY, tree, mj.Known())
    assert changed["a"].tolist() == [2, 2] and changed["b"].tolist() == [1, 1] and changed["n"].tolist() == [0, 1]


@pytest.mark.parametrize("over", ["map", "vmap"])
def test_best_of_keeps_the_lowest(over):
    draw = lambda key, subject, known: (jax.random.normal(key), {})
    result, info = combine.best_of(draw, 5, lambda value, info: value, over=over)(KEY, None, mj.Known())
    assert float(result) == float(jnp.min(info["losses"])) and info["losses"].shape == (5,)


def test_filter_removes_the_top_fraction_of_the_present_rows():
    problem = problems.make()
    sanitize = combine.filter_top(distance, fraction=0.25, reads_model=False)
    kept, info = jax.jit(sanitize)(KEY, problem.train, mj.Known())
    removed = np.flatnonzero((np.asarray(problem.train.weight) > 0) & (np.asarray(kept.weight) == 0))
    score = np.where(np.asarray(problem.train.weight) > 0, np.asarray(info["score"]), -np.inf)
    assert sorted(removed) == sorted(np.argsort(-score)[:3]) and int(info["num_removed"]) == 3
    nothing, _ = combine.filter_top(distance, fraction=0.0, reads_model=False)(KEY, problem.train, mj.Known())
    assert oracles.trees_equal(nothing, problem.train)


def test_surrogate_gradients_of_a_filter():
    problem = problems.make()
    data = threat.append_rows(problem.reserved).embed(problem.train.x[problem.reserved] + 0.6, problem.train)

    def kept_mass(x, gradient):
        sanitize = combine.filter_top(distance, fraction=0.2, gradient=gradient, reads_model=False)
        clean, _ = sanitize(KEY, data._replace(x=data.x.at[problem.reserved].set(x)), mj.Known())
        return jnp.sum(clean.weight[problem.reserved])

    start = data.x[problem.reserved]
    hard, soft, through = "hard", combine.soft(0.3), combine.straight_through(0.3)
    assert float(kept_mass(start, hard)) == float(kept_mass(start, through)) == 0.0
    assert 0.0 < float(kept_mass(start, soft)) < 2.0
    assert not jnp.any(jax.grad(kept_mass)(start, hard))
    np.testing.assert_allclose(jax.grad(kept_mass)(start, soft), jax.grad(kept_mass)(start, through), rtol=1e-6)
    assert float(jnp.vdot(jax.grad(kept_mass)(start, soft), start - 0.5)) < 0  # farther away is more suspicious


def test_a_defended_trainer_is_a_trainer_and_its_stages_are_kept_apart():
    problem = problems.make()
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 5)
    flip = lambda key, batch: batch._replace(x=1 - batch.x)
    shrink = lambda key, params, known: (jax.tree.map(lambda leaf: leaf / 2, params), {"halved": True})
    sanitize = combine.filter_top(distance, fraction=0.25, reads_model=False)
    guarded = combine.defended(trainer, before=[sanitize], during=flip, after=[shrink])
    trained, info = jax.jit(guarded)(KEY, problem.params, problem.train)
    clean, _ = sanitize(KEY, problem.train, mj.Known())
    expected, _ = trainer(KEY, problem.params, clean._replace(x=1 - clean.x))
    assert oracles.trees_close(trained, jax.tree.map(lambda leaf: leaf / 2, expected), rtol=1e-5)
    assert set(info) == {"before", "train", "after", "weight"} and oracles.trees_equal(info["weight"], clean.weight)


def test_a_probe_is_trained_for_a_stage_that_needs_a_model():
    problem = problems.make()
    seen = []

    def loss_score(key, params, data, known):
        seen.append(params is not None)
        return problem.loss_fn(params, data)

    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 5)
    _, info = combine.defended(trainer, before=[combine.filter_top(loss_score, fraction=0.25)])(
        KEY, problem.params, problem.train
    )
    probe, _ = trainer(KEY, problem.params, problem.train)  # full batch: the key does not matter
    expected = problem.loss_fn(probe, problem.train)
    assert seen == [True] and oracles.trees_close(info["before"][0]["score"], expected, rtol=1e-4)
    with pytest.raises(ValueError, match=r"needs known\.params"):
        combine.filter_top(loss_score, fraction=0.25)(KEY, problem.train, mj.Known())


def test_a_batch_transform_given_outside_is_the_one_given_inside():
    """The probe sees clean batches either way, so that the same rows are kept and the victim is the same."""
    problem = problems.make()
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 5)
    flip = lambda key, batch: batch._replace(x=1 - batch.x)
    sanitize = combine.filter_top(lambda key, params, data, known: problem.loss_fn(params, data), fraction=0.25)
    trained, info = combine.defended(trainer, before=[sanitize], during=flip)(KEY, problem.params, problem.train)
    outside, told = combine.defended(combine.defended(trainer, before=[sanitize]), during=flip)(
        KEY, problem.params, problem.train
    )
    assert oracles.trees_equal(told["train"]["before"][0]["score"], info["before"][0]["score"])
    assert oracles.trees_close(outside, trained, rtol=1e-5)  # full batch: the key does not matter


def test_an_adaptive_attack_is_the_old_attack_on_a_defended_trainer():
    problem = problems.make()
    reach = threat.append_rows(problem.reserved)
    outer = losses.goal_loss(problem.loss_fn)
    far = problem.train._replace(x=problem.train.x.at[problem.reserved].set(jnp.eye(2, problems.DIM) * -1 + 1))
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 10)

    def attack(gradient):
        sanitize = combine.filter_top(distance, fraction=0.2, gradient=gradient, reads_model=False)
        guarded = combine.defended(trainer, before=[sanitize])
        algorithm = attacks.bilevel(outer, guarded, threat=reach, optimizer=attacks.unit_rows(0.1))
        return jax.jit(lambda: combine.run(algorithm, KEY, far, problem.known, num_steps=40))()

    with pytest.raises(ValueError, match="no poison row had a gradient"):
        attacks.require_alive(attack("hard")[1])
    state, infos = attack(combine.straight_through(0.3))
    attacks.require_alive(infos)
    assert float(infos["outer"][-1]) < float(infos["outer"][0])
    judge = combine.defended(trainer, before=[combine.filter_top(distance, fraction=0.2, reads_model=False)])
    value = lambda poison: outer(judge(KEY, problem.params, reach.embed(poison, far))[0], far, problem.known.goal)
    assert float(value(state.poison)) < float(value(reach.init(KEY, far)))


def test_greedy_moves_one_point_at_a_time_and_adds_them_in_turn():
    order = attacks.greedy(2, passes=2)
    seen = [tuple(jnp.stack(order(jnp.int32(step), 3)).astype(int).tolist()) for step in (0, 2, 5, 6, 11)]
    assert seen[0] == ([1, 0, 0], [1, 0, 0]) and seen[1] == ([1, 1, 0], [0, 1, 0]) and seen[2] == ([1, 1, 1], [0, 0, 1])
    assert seen[3] == ([1, 1, 1], [1, 0, 0]) and seen[4] == ([1, 1, 1], [0, 0, 1])
    problem = problems.make()
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 3)
    algorithm = attacks.error_specific(
        problem.loss_fn,
        trainer,
        threat=threat.append_rows(problem.reserved),
        optimizer=optax.adam(0.1),  # its momentum must not move a resting point
        order=attacks.greedy(2),
    )
    state = algorithm.init(KEY, problem.train, problem.known)
    step = jax.jit(algorithm.step)
    for k in range(4):
        before = state.poison
        state, _ = step(KEY, state, problem.train, problem.known)
        moved = jnp.any(state.poison != before, axis=1).tolist()
        assert moved == [k < 2, k >= 2]


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: combine.filter_top(distance, fraction=1.5), "fraction"),
        (lambda: combine.filter_top(distance, fraction=0.5, gradient="magic"), "gradient"),
        (lambda: combine.soft(0.0), "temperature"),
        (lambda: combine.best_of(None, 0, None), "num_restarts"),
        (lambda: combine.defended(lambda key, params, data: (params, {}), during=lambda key, batch: batch), "during"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_filter_above_is_a_threshold_and_its_surrogate_has_the_sigmoids_slope():
    data = mj.dataset(jnp.zeros((4, 1)), jnp.zeros(4, jnp.int32), jnp.array([1.0, 1.0, 0.0, 2.0]))
    value = jnp.array([0.1, 0.9, 5.0, 0.7])
    scorer = lambda key, params, data, known: value
    hard, info = combine.filter_above(scorer, threshold=0.7, reads_model=False)(jax.random.key(0), data, mj.Known())
    assert hard.weight.tolist() == [1, 0, 0, 2] and int(info["num_removed"]) == 1

    def weight(shift):
        moved = lambda *args: value + shift
        soft = combine.filter_above(moved, threshold=0.7, gradient=combine.soft(0.2), reads_model=False)
        return soft(jax.random.key(0), data, mj.Known())[0].weight[0]

    s = jax.nn.sigmoid(0.6 / 0.2)
    assert jnp.allclose(jax.grad(weight)(0.0), -s * (1 - s) / 0.2, rtol=1e-5)


def test_filter_top_of_each_class_is_the_filter_of_each_class_alone():
    y = jnp.array([0, 1, 0, 1, 1, 0, 1, 0, 0, 1], jnp.int32)
    data = mj.dataset(jnp.zeros((10, 1)), y, jnp.ones(10).at[9].set(0))
    score = jax.random.normal(jax.random.key(0), (10,))
    scorer = lambda key, params, data, known: score
    options = dict(fraction=0.5, reads_model=False, gradient=combine.soft(0.3))
    both, info = combine.filter_top(scorer, num_classes=2, **options)(jax.random.key(0), data, mj.Known())
    for c in range(2):
        only = data._replace(weight=jnp.where(y == c, data.weight, 0))
        alone, its = combine.filter_top(scorer, **options)(jax.random.key(0), only, mj.Known())
        assert jnp.allclose(jnp.where(y == c, both.weight, 0), alone.weight)
        assert info["threshold"][c] == its["threshold"] and info["num_removed"][c] == its["num_removed"]


def test_defended_trainers_nest():
    problem = problems.make()
    inner = combine.defended(bilevel.unrolled(problem.loss_fn, optax.sgd(0.1), 2), after=[lambda key, p, known: (p, {})])
    halved = lambda key, batch: batch._replace(x=batch.x / 2)
    twice = combine.defended(inner, during=halved)
    alone = combine.defended(bilevel.unrolled(problem.loss_fn, optax.sgd(0.1), 2), during=halved)
    key = jax.random.key(0)
    once = jax.random.split(key, 4)[2]  # what `defended` gives its trainer
    found = twice(key, problem.params, problem.train)[0]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone(once, problem.params, problem.train)[0])):
        np.testing.assert_array_equal(a, b)


def test_a_filter_removes_what_has_no_score_first_and_all_of_a_class_softly():
    rows = mj.dataset(jnp.zeros((4, 1)), jnp.array([0, 0, 1, 1]))
    lost = combine.filter_top(lambda *_: jnp.array([0.0, jnp.nan, 2.0, 1.0]), fraction=0.25, reads_model=False)
    assert lost(jax.random.key(0), rows, mj.Known())[0].weight.tolist() == [1, 0, 1, 1]
    options = {"fraction": 1.0, "gradient": combine.soft(0.1), "reads_model": False, "num_classes": 2}
    weight = combine.filter_top(lambda *_: jnp.arange(4.0), **options)(jax.random.key(0), rows, mj.Known())[0].weight
    np.testing.assert_allclose(weight, [0.5, 0, 0.5, 0], atol=1e-3)


@pytest.mark.parametrize(
    ("fraction", "n", "removed"), [(0.84, 75, 63), (0.21, 300, 63), (0.009, 5000, 45), (0.817, 10000, 8170), (1.0, 301, 301)]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_share_is_counted_as_in_decimals(fraction, n, removed, dtype):
    scorer = lambda key, params, data, known: jnp.arange(n, dtype=dtype)
    data = mj.dataset(jnp.zeros((n, 1)), jnp.zeros(n, jnp.int32))
    info = combine.filter_top(scorer, fraction=fraction, reads_model=False)(jax.random.key(0), data, mj.Known())[1]
    assert info["num_removed"] == removed


def test_filtering_by_class_refuses_labels_that_it_would_pass_over():
    scorer = lambda key, params, data, known: data.x
    cut = combine.filter_top(scorer, fraction=0.5, reads_model=False, num_classes=2)
    with pytest.raises(ValueError, match=r"subject.y: expected labels in \[0, 2\)"):
        cut(jax.random.key(0), mj.dataset(jnp.arange(9.0), jnp.arange(9) // 3), mj.Known())
    with pytest.raises(ValueError, match=r"subject.y: expected integer labels \[n\]"):
        cut(jax.random.key(0), mj.dataset(jnp.arange(2.0), jnp.eye(2)), mj.Known())
