"""Bad input gets one clear error, and nothing is lost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, checks, combine, loop, losses, measure, scores, threat
from mlsec_jax.drive import drive
from tests import oracles, problems

KEY = jax.random.key(0)


def attack(problem, reach=None):
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 2)
    reach = reach or threat.append_rows(problem.reserved)
    return attacks.error_specific(problem.loss_fn, trainer, threat=reach, optimizer=attacks.unit_rows(0.1))


def test_nan_in_data_is_refused_at_the_border():
    problem = problems.make()
    train = problem.train._replace(x=problem.train.x.at[3, 1].set(jnp.nan))
    with pytest.raises(ValueError, match=r"subject\.x: expected finite values, got NaN or infinity in 1 rows \(first: 3\)"):
        combine.run(attack(problem), KEY, train, problem.known, num_steps=1)


def test_labels_out_of_range_are_refused_or_poison_the_result():
    problem = problems.make()
    train = problem.train._replace(y=problem.train.y.at[0].set(7))
    with pytest.raises(ValueError, match=r"subject\.y: expected labels in \[0, 3\), got 0 to 7"):
        combine.run(attack(problem), KEY, train, problem.known, num_steps=1)
    jitted = jax.jit(lambda data: losses.empirical(problem.loss_fn)(problem.params, data))
    assert bool(jnp.isnan(jitted(train))) and not bool(jnp.isnan(jitted(problem.train)))


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda d: d._replace(y=jnp.zeros_like(d.y)), r"none of \[1, 2\]"),
        (lambda d: d._replace(y=d.y.at[0].set(3)), r"labels in \[0, 3\)"),
        (lambda d: d._replace(weight=-d.weight), "non-negative"),
        (lambda d: d._replace(weight=0 * d.weight), "positive weight"),
    ],
)
def test_data_is_checked(change, match):
    problem = problems.make()
    checks.data("train", problem.train, 3)
    with pytest.raises(ValueError, match=match):
        checks.data("train", change(problem.train), 3)


def test_an_empty_budget_gives_the_input_back_and_a_large_one_is_refused():
    problem = problems.make()
    nothing = attack(problem, threat.append_rows(0))
    state, _ = combine.run(nothing, KEY, problem.train, problem.known, num_steps=2)
    assert oracles.trees_equal(nothing.read(state, problem.train), problem.train)
    with pytest.raises(ValueError, match="larger than the reserve"):
        combine.run(attack(problem, threat.append_rows(5)), KEY, problem.train, problem.known, num_steps=1)


def test_a_trainer_that_cannot_be_differentiated_is_noticed():
    problem = problems.make()
    blind = lambda key, params, data: (jax.lax.stop_gradient(params), {})
    outer = losses.goal_loss(problem.loss_fn)
    stuck = attacks.bilevel(
        outer, blind, threat=threat.append_rows(problem.reserved), optimizer=attacks.unit_rows(0.1)
    )
    with pytest.raises(ValueError, match="no poison row had a gradient"):
        attacks.require_alive(combine.run(stuck, KEY, problem.train, problem.known, num_steps=2)[1])


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: mj.dataset(jnp.zeros((3, 2)), jnp.zeros(2)), "same number of rows"),
        (lambda: mj.dataset({}, jnp.zeros(2)), "empty pytree"),
        (lambda: mj.dataset(jnp.zeros((2, 2)), jnp.zeros(2), jnp.ones(3)), "weight"),
        (lambda: mj.Known(gaol=1), "gaol"),
    ],
)
def test_shapes_and_typos_are_named(call, match):
    with pytest.raises((ValueError, TypeError), match=match):
        call()


@pytest.mark.parametrize(
    "change,match",
    [
        (lambda s, k: (s._replace(x=s.x.at[3, 1].set(jnp.nan)), k), r"subject\.x: expected finite"),
        (lambda s, k: (s._replace(y=s.y.at[0].set(7)), k), r"labels in \[0, 3\)"),
        (lambda s, k: (s, k.replace(goal=k.goal._replace(x=k.goal.x * jnp.nan))), r"known\.goal\.x: expected finite"),
    ],
)
def test_drive_looks_at_the_data_before_it_compiles(change, match):
    problem = problems.make()
    with pytest.raises(ValueError, match=match):
        drive(attack(problem), KEY, *change(problem.train, problem.known), num_steps=1)


def starting_from(problem, x, y):
    fresh = jax.tree.map(lambda leaf: leaf[: -problem.reserved.size], problem.train)
    return threat.reserve(fresh, mj.dataset(x * jnp.ones((2, *fresh.x.shape[1:])), jnp.array(y)))


@pytest.mark.parametrize(
    "x,y,match",
    [
        (jnp.nan, [0, 1], r"subject\.x: expected finite values, got NaN or infinity in 2 rows"),
        (0.5, [0, 9], r"subject\.y: expected labels in \[0, 3\), got 0 to 9"),
    ],
)
def test_reserved_rows_are_looked_at_with_the_poisons_in_them(x, y, match):
    problem = problems.make()
    train = starting_from(problem, x, y)
    with pytest.raises(ValueError, match=match):
        attack(problem, threat.append_rows(2)).init(KEY, train, problem.known)


def test_labels_of_the_goal_are_called_so():
    problem = problems.make()
    known = problem.known.replace(goal=problem.known.goal._replace(y=jnp.full_like(problem.known.goal.y, 9)))
    with pytest.raises(ValueError, match=r"^known\.goal\.y: expected labels in \[0, 3\), got 9 to 9"):
        attack(problem).init(KEY, problem.train, known)


def test_integers_cannot_be_moved():
    problem = problems.make()
    images = problem.train._replace(x=(255 * problem.train.x).astype(jnp.uint8))
    with pytest.raises(ValueError, match=r"subject\.x: expected floating inputs.*uint8"):
        attack(problem).init(KEY, images, problem.known)


@pytest.mark.parametrize("solver", [bilevel.newton, bilevel.lbfgs])
@pytest.mark.parametrize("l1", [0.3, jnp.float32(0.3)])
def test_a_smooth_solver_does_not_leave_out_l1(solver, l1):
    line = lambda params, x, key=None: x @ params["w"]
    rows = mj.dataset(jnp.ones((4, 2)), jnp.arange(4.0))
    train = bilevel.implicit(losses.regularised(losses.squared(line), l1=l1), solver=solver())
    with pytest.raises(ValueError, match=r"solver: expected proximal_gradient\(\)"):
        train(KEY, {"w": jnp.zeros(2)}, rows)
    reach = threat.perturb_rows([0])
    attack = attacks.linear_regression(line, threat=reach, optimizer=attacks.unit_rows(0.1), l1=l1, solver=solver())
    with pytest.raises(ValueError, match=r"solver: expected proximal_gradient\(\)"):
        attack.init(KEY, rows, mj.Known(params={"w": jnp.zeros(2)}, goal=rows))


SOFT = mj.dataset(jnp.zeros((3, 1)), jnp.eye(3))


THREE = mj.dataset(jnp.zeros((3, 1)), jnp.array([0, 1, 2]))


def three_classes(scorer):
    return scorer(KEY, None, THREE, mj.Known())


def scored(name, x, y):
    """The scores of a set of 12 clean rows of two classes that are like it but for the row 5, in which x is put."""
    clean = mj.dataset(jax.random.normal(KEY, (12, 4)), jnp.arange(12) % 2)
    data = clean._replace(x=clean.x.at[5].set(x), y=y(clean.y))
    identity = lambda params, x, key=None: x
    linear = lambda params, x, key=None: x @ params
    loss_fn = losses.cross_entropy(linear)
    trainer = bilevel.unrolled(loss_fn, optax.sgd(0.1), 1)
    scorer = {
        "spectral": scores.spectral(identity, num_classes=2),
        "activation_clusters": scores.activation_clusters(identity, num_classes=2, num_components=2),
        "deep_knn": scores.deep_knn(identity, num_neighbours=2, num_classes=2),
        "sphere": scores.sphere(),
        "strip": scores.strip(linear, num_overlays=4),
        "roni": scores.roni(linear, trainer, num_train=4, num_quiz=4, num_trials=1),
        "influence": scores.influence(loss_fn, trainer),
        "low_loss": scores.low_loss(loss_fn, trainer=trainer),
    }[name]
    return lambda data=data, clean=clean: scorer(KEY, jnp.ones((4, 2)), data, mj.Known(clean=clean, holdout=clean))


BY_FEATURES = ["spectral", "activation_clusters", "deep_knn"]


@pytest.mark.parametrize("name", [*BY_FEATURES, "sphere", "strip", "roni", "influence", "low_loss"])
def test_nan_in_a_present_row_has_no_score(name):
    score = scored(name, jnp.nan, lambda y: y)
    what = "features_fn" if name in BY_FEATURES else r"data\.x"
    with pytest.raises(ValueError, match=rf"{what}: expected finite values, got NaN or infinity in 1 rows \(first: 5\)"):
        score()


@pytest.mark.parametrize("name", BY_FEATURES)
@pytest.mark.parametrize("y", [lambda y: jax.nn.one_hot(y, 2), lambda y: y.astype(jnp.float32)], ids=["soft", "real"])
def test_scores_by_class_need_integer_labels(name, y):
    with pytest.raises(ValueError, match=r"data\.y: expected integer labels \[n\], got float32"):
        jax.jit(scored(name, 0.0, y))()


def few_clean_rows():
    clean = mj.dataset(jnp.ones((80, 2)), jnp.zeros(80, jnp.int32), jnp.zeros(80).at[:20].set(1.0))
    scorer = scores.roni(lambda params, x, key=None: x @ params, lambda key, params, data: (params, {}))
    return scorer(KEY, jnp.eye(2), mj.dataset(jnp.ones((3, 2)), jnp.zeros(3, jnp.int32)), mj.Known(clean=clean))


@pytest.mark.parametrize(
    "call,match",
    [
        (lambda: three_classes(scores.sphere()), r"labels \{0, 1\} or"),
        (lambda: three_classes(scores.slab()), r"labels \{0, 1\} or"),
        (lambda: losses.margin(lambda params, x, key=None: jnp.ones((3, 2)))(None, THREE), r"labels in \[0, 2\)"),
        (lambda: losses.hinge(lambda params, x, key=None: x)(None, THREE), r"labels \{0, 1\} or"),
        (lambda: attacks.error_specific_goal(SOFT, source=1, target=0), r"holdout.y: expected one label a row"),
        (lambda: attacks.start_points(KEY, SOFT, 2, rule=attacks.swap(0, 1)), r"train.y: expected one label a row"),
        (few_clean_rows, "at most the 20 rows of known.clean"),
        (lambda: threat.additive(jnp.full((2, 2, 1), 0.9), radius=8 / 255), "pattern: expected at most radius"),
        (lambda: threat.corners(jnp.ones((3, 3, 1)))(None, jnp.zeros((1, 4, 4, 1))), "four times side by side"),
        (lambda: threat.to_class(7)(jnp.ones((2, 3))), "less than the 3 classes"),
        (lambda: threat.to_class(300)(jnp.zeros(2, jnp.uint8)), "target: expected at most 255 for labels of uint8"),
        (lambda: measure.accuracy(jnp.ones((2, 1)), mj.dataset(jnp.ones((2, 1)), jnp.array([0, 1]))), "c > 1"),
    ],
)  # fmt: skip
def test_what_would_be_a_wrong_number_is_one_sentence(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_diverged_model_is_never_right():
    rows = mj.dataset(jnp.ones((2, 1)), jnp.array([0, 1]))
    assert float(measure.accuracy(jnp.full((2, 3), jnp.nan), rows)) == 0


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_base_outside_the_box_stays_in_its_ball(norm):
    rows = mj.dataset(jnp.array([[-2.0, 0.5, 3.0]]), jnp.array([0]))
    far = rows.x + jnp.array([[9.0, -9.0, -9.0]])
    for radius in (0.0, 0.125):
        reach = threat.perturb_rows(jnp.array([0]), radius=radius, norm=norm)
        assert oracles.trees_equal(reach.project(rows.x, rows), rows.x)
        assert float(jnp.max(jnp.abs(reach.project(far, rows) - rows.x))) <= radius


def test_weights_may_be_integers_or_a_mask_and_absent_labels_anything():
    x = jnp.zeros((4, 1))
    keep = combine.filter_top(lambda *_: jnp.arange(4.0), fraction=0.5, gradient=combine.soft(1.0), reads_model=False)
    kept = [keep(KEY, mj.dataset(x, jnp.zeros(4, jnp.int32), jnp.ones(4, kind)), mj.Known())[0].weight
            for kind in (jnp.float32, jnp.int32, bool)]  # fmt: skip
    assert oracles.trees_equal(kept[0], kept[1]) and oracles.trees_equal(kept[0], kept[2])
    squared = losses.empirical(losses.squared(lambda params, x, key=None: x @ params))
    rows = mj.dataset(jnp.ones((2, 1)), jnp.array([0.0, jnp.nan]), jnp.array([1.0, 0.0]))
    assert bool(jnp.all(jnp.isfinite(jax.grad(squared)(jnp.ones(1), rows))))


@pytest.mark.parametrize("score", [lambda *_: jnp.zeros((3, 1)), lambda *_: jnp.zeros(())])
def test_a_score_or_a_loss_that_is_not_one_number_a_row_is_refused(score):
    with pytest.raises(ValueError, match=r"scorer: expected one number a row, \(3,\)"):
        combine.filter_top(score, fraction=0.5, reads_model=False)(KEY, THREE, mj.Known())
    with pytest.raises(ValueError, match="values: expected one number a row"):
        losses.empirical(lambda params, data, key=None: jnp.zeros(()))(None, THREE)
    with pytest.raises(ValueError, match="apply_fn: expected logits"):
        losses.cross_entropy(lambda params, x, key=None: jnp.zeros(3))(None, THREE)


def test_a_filter_of_counts_is_the_filter_of_numbers():
    rows = mj.dataset(jnp.zeros((8, 1)), jnp.zeros(8, jnp.int32))
    top = lambda score: combine.filter_top(lambda *_: score, fraction=0.25, reads_model=False)
    above = lambda score: combine.filter_above(lambda *_: score - 4, threshold=-0.5, reads_model=False)
    for make in (top, above):
        counts, numbers = (make(score)(KEY, rows, mj.Known())[0].weight for score in (jnp.arange(8), jnp.arange(8.0)))
        assert oracles.trees_equal(counts, numbers) and float(jnp.sum(counts)) < 8


def test_a_poison_without_effect_is_seen_though_its_threat_names_no_rows():
    problem = problems.make()
    reach = threat.append_rows(problem.reserved)
    mute = mj.Threat(reach.init, reach.project, lambda poison, data: data._replace(x=data.x + 0 * jnp.sum(poison)), None)
    _, infos = combine.run(attack(problem, mute), KEY, problem.train, problem.known, num_steps=1)
    with pytest.raises(ValueError, match="no poison row had a gradient"):
        attacks.require_alive(infos)


def test_data_made_of_numpy_arrays_work_without_jit():
    problem = problems.make()
    soft = problem.train._replace(y=losses.soft_labels(problem.train.y, 3, problem.train.x.dtype))
    as_numpy = lambda data: jax.tree.map(np.asarray, data)
    threats = [threat.append_rows(problem.reserved), threat.perturb_rows(2, radius=0.1), threat.reweigh(2, radius=0.1)]
    for reach, data in [(each, problem.train) for each in threats] + [(threat.flip_labels(2, budget=1.0), soft)]:
        embedded = lambda rows, reach=reach: reach.embed(reach.project(reach.init(KEY, rows), rows), rows)
        jax.tree.map(np.testing.assert_array_equal, embedded(as_numpy(data)), embedded(data))
    shuffled = dict(batching=loop.shuffled(4))
    for trainer in (
        bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 2, **shuffled),
        bilevel.forward(problem.loss_fn, optax.sgd(0.5), 2, rows=2, **shuffled),
    ):
        told = lambda data, trainer=trainer: bilevel.diagnose(
            trainer, KEY, problem.params, data, outer=losses.goal_loss(problem.loss_fn), goal=problem.train, rows=2
        )
        jax.tree.map(np.testing.assert_array_equal, told(as_numpy(problem.train)), told(problem.train))
