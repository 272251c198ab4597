"""Clean-label attacks against closed forms, central differences and brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import attacks, combine, linalg, losses, models, threat, tree
from mlsec_jax.attacks import _matching
from tests import oracles, test_linalg

K, D, H = 4, 6, 5
FREE = threat.perturb_rows(jnp.arange(K), lo=-jnp.inf, hi=jnp.inf)
DESCEND = optax.sgd(1.0)  # what a step subtracts is then the gradient


def features(params, x, key=None):
    """Two layers of a small smooth network."""
    hidden = jnp.tanh(x @ params["a"])
    return {"first": hidden, "second": jnp.sin(hidden @ params["b"])}


def apply_fn(params, x, key=None):
    return features(params, x)["second"] @ params["head"]


loss_fn = losses.cross_entropy(apply_fn)


def problem(dtype=jnp.float64, num_targets=1):
    keys = jax.random.split(jax.random.key(0), 6)
    params = {
        "a": jax.random.normal(keys[0], (D, H), dtype),
        "b": jax.random.normal(keys[1], (H, H), dtype),
        "head": jax.random.normal(keys[2], (H, 3), dtype),
    }
    data = mj.dataset(jax.random.uniform(keys[3], (2 * K, D), dtype), jnp.zeros(2 * K, jnp.int32))
    goal = mj.dataset(jax.random.uniform(keys[4], (num_targets, D), dtype), jnp.zeros(num_targets, jnp.int32))
    return params, data, mj.Known(params=params, goal=goal)


def flat(params, x):
    return [np.asarray(leaf).reshape(len(x), -1) for leaf in jax.tree.leaves(features(params, x))]


def bullseye(params, x, goal):
    pairs = zip(flat(params, x), flat(params, goal.x))
    return np.mean([np.linalg.norm(f.mean(0) - t.mean(0)) / np.linalg.norm(t.mean(0)) for f, t in pairs])


def bullseye_squared(params, x, goal):
    pairs = zip(flat(params, x), flat(params, goal.x))
    return np.mean([np.sum((f.mean(0) - t.mean(0)) ** 2) / np.sum(t.mean(0) ** 2) / 2 for f, t in pairs])


def polytope(params, x, goal):
    offsets = [(f - t.mean(0), t.mean(0)) for f, t in zip(flat(params, x), flat(params, goal.x))]
    return np.mean([test_linalg.brute_force(d @ d.T) / np.sum(t**2) / 2 for d, t in offsets])


def matching(params, x, goal):
    mean_loss = lambda p, x, y: jnp.mean(loss_fn(p, mj.dataset(x, y)))
    vector = lambda x, y: np.concatenate([np.ravel(g) for g in jax.tree.leaves(jax.grad(mean_loss)(params, x, y))])
    ours, wanted = vector(x, jnp.zeros(len(x), jnp.int32)), vector(goal.x, goal.y)
    return 1 - ours @ wanted / np.linalg.norm(ours) / np.linalg.norm(wanted)


def collision(params, x, goal):
    pairs = zip(flat(params, x), flat(params, goal.x))
    return np.mean([np.sum((f - t.mean(0)) ** 2, axis=1) / np.sum(t.mean(0) ** 2) for f, t in pairs])


LOSSES = {
    "collision": (collision, functools.partial(attacks.feature_collision, features)),
    "bullseye": (bullseye, functools.partial(attacks.bullseye_polytope, features)),
    "bullseye squared": (bullseye_squared, functools.partial(attacks.bullseye_polytope, features, squared=True)),
    "polytope": (polytope, functools.partial(attacks.convex_polytope, features)),
    "polytope of equal coefficients": (
        bullseye_squared,
        functools.partial(attacks.convex_polytope, features, coefficients_fn=lambda gram: linalg.descend_in_hull(gram, 0)),
    ),
    "matching": (matching, functools.partial(attacks.gradient_matching, loss_fn)),
}


@pytest.mark.parametrize("num_targets", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_their_gradients_are_the_papers(x64, name, num_targets):
    oracle, factory = LOSSES[name]
    params, data, known = problem(num_targets=num_targets)
    algorithm = factory(threat=FREE, optimizer=DESCEND)
    state = algorithm.init(jax.random.key(1), data, known)
    after, info = jax.jit(algorithm.step)(jax.random.key(2), state, data, known)
    np.testing.assert_allclose(info["outer"], oracle(params, data.x[:K], known.goal), rtol=1e-9)
    gradient = data.x[:K] - after.poison
    slopes, directions = oracles.central_differences(lambda x: oracle(params, x, known.goal), data.x[:K])
    np.testing.assert_allclose([float(jnp.vdot(gradient, u)) for u in directions], slopes, rtol=1e-6, atol=1e-9)


def test_collision_of_identity_features_is_a_closed_form(x64):
    _, data, known = problem()
    target, base, beta = known.goal.x, data.x[:K], 0.7
    algorithm = attacks.feature_collision(lambda params, x, key=None: x, threat=FREE, beta=beta)
    state, infos = combine.run(algorithm, jax.random.key(0), data, known, num_steps=200)
    weight = 1 / jnp.sum(target**2)
    np.testing.assert_allclose(state.poison, (weight * target + beta * base) / (weight + beta), rtol=1e-6)
    assert np.all(np.diff(infos["value"], axis=0) <= 0)  # a step that does not help is taken back


def test_the_watermark_is_blended_before_optimising(x64):
    _, data, known = problem()
    marked = attacks.feature_collision(lambda params, x, key=None: x, threat=FREE, opacity=0.3)
    state = marked.init(jax.random.key(0), data, known)
    np.testing.assert_allclose(state.poison, 0.3 * known.goal.x + 0.7 * data.x[:K], rtol=1e-12)
    near = attacks.feature_collision(
        lambda params, x, key=None: x, threat=threat.perturb_rows(jnp.arange(K), radius=0.05), opacity=0.3
    )
    state = near.init(jax.random.key(0), data, known)
    assert float(jnp.max(jnp.abs(state.poison - data.x[:K]))) <= 0.05 + 1e-12


def test_every_member_of_an_ensemble_counts_alike(x64):
    params, data, known = problem()
    others = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, leaf[..., ::-1]]), params)
    fn = models.ensemble([features], over="map")
    algorithm = attacks.bullseye_polytope(fn, threat=FREE, optimizer=DESCEND)
    together = known.replace(surrogates=(others,))
    state = algorithm.init(jax.random.key(0), data, together)
    _, info = algorithm.step(jax.random.key(0), state, data, together)
    alone = [bullseye(tree.take(others, m), data.x[:K], known.goal) for m in range(3)]
    np.testing.assert_allclose(info["outer"], np.mean(alone), rtol=1e-9)


def test_draws_are_averaged_and_anew_every_step(x64):
    _, data, known = problem()
    noisy = lambda params, x, key=None: x if key is None else x + jax.random.normal(key, x.shape, x.dtype)

    def spread(draws):
        algorithm = attacks.bullseye_polytope(noisy, threat=FREE, optimizer=DESCEND, num_draws=draws)
        state = algorithm.init(jax.random.key(0), data, known)
        keys = jax.random.split(jax.random.key(1), 20)
        step = lambda key: algorithm.step(key, state, data, known)[1]["outer"]
        return jnp.std(jax.jit(jax.lax.map, static_argnums=0)(step, keys))

    assert spread(64) < spread(1) / 3


def test_matching_in_batches_sees_every_poison_once(x64):
    params, data, known = problem()
    algorithm = attacks.gradient_matching(loss_fn, threat=FREE, optimizer=DESCEND, batch_size=1)
    state = algorithm.init(jax.random.key(0), data, known)
    _, info = algorithm.step(jax.random.key(0), state, data, known)
    np.testing.assert_allclose(info["outer"], np.mean([matching(params, x[None], known.goal) for x in data.x[:K]]), rtol=1e-9)


@pytest.mark.slow
def test_matching_over_several_networks_and_with_augmentation(x64):
    params, data, known = problem()
    several = known.replace(surrogates=jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params))
    shift = lambda key, batch: batch._replace(x=batch.x + 0.1)
    for over in ("map", "vmap"):
        algorithm = attacks.gradient_matching(loss_fn, threat=FREE, optimizer=DESCEND, over=over, augment_fn=shift)
        state = algorithm.init(jax.random.key(0), data, several)
        _, info = algorithm.step(jax.random.key(0), state, data, several)
        alone = [matching(jax.tree.map(lambda leaf, s=s: s * leaf, params), data.x[:K] + 0.1, known.goal) for s in (1, 0.5)]
        np.testing.assert_allclose(info["outer"], np.mean(alone), rtol=1e-9)


def test_largest_gradients_are_those_of_softmax_regression(x64):
    model = models.softmax_regression(num_classes=3)
    rng = np.random.default_rng(0)
    data = mj.dataset(jnp.asarray(rng.normal(size=(20, D))), jnp.asarray(rng.integers(0, 3, 20)))
    params = model.init(jax.random.key(0), data.x)
    rows, info = attacks.largest_gradients(
        losses.cross_entropy(model.apply), data, mj.Known(params=params), label=1, num_rows=3, batch_size=7
    )
    error = jax.nn.softmax(model.apply(params, data.x)) - jax.nn.one_hot(data.y, 3)
    norms = jnp.linalg.norm(error, axis=1) * jnp.sqrt(1 + jnp.sum(data.x**2, axis=1))
    expected = sorted(np.flatnonzero(np.asarray(data.y) == 1), key=lambda row: -float(norms[row]))[:3]
    assert rows.tolist() == [int(row) for row in expected]
    np.testing.assert_allclose(info["norm"][rows], norms[rows], rtol=1e-6)
    with pytest.raises(ValueError, match="rows of label 1, got 20"):
        attacks.largest_gradients(losses.cross_entropy(model.apply), data, mj.Known(params=params), label=1, num_rows=20)


def test_sleeper_agent_retrains_when_it_says(x64):
    _, data, known = problem()
    data = data._replace(y=jnp.arange(2 * K, dtype=jnp.int32) % 3)
    fit = lambda key, start, train: (jax.tree.map(lambda p: p + jnp.mean(train.x) + jax.random.normal(key), start), {})
    trigger = lambda key, x: x.at[:, 0].set(2.0)
    algorithm = attacks.sleeper_agent(loss_fn, fit, trigger, threat=FREE, optimizer=DESCEND, retrain_every=2)
    state = algorithm.init(jax.random.key(0), data, known)
    goal = known.goal._replace(x=trigger(None, known.goal.x))
    for step, due in enumerate([False, False, True, False, True]):
        before = state
        state, info = jax.jit(algorithm.step)(jax.random.key(step), state, data, known)
        assert bool(info["retrained"]) == due
        assert oracles.trees_equal(before.surrogate, state.surrogate) != due
        poisons = mj.dataset(before.poison, data.y[:K])
        ours = jax.grad(lambda p, poisons=poisons: jnp.mean(loss_fn(p, poisons)))(state.surrogate)
        wanted = jax.grad(lambda p: jnp.mean(loss_fn(p, goal)))(state.surrogate)
        np.testing.assert_allclose(info["cosine"], tree.cosine(ours, wanted), rtol=1e-9)


@pytest.mark.parametrize("name", ["feature_collision", "convex_polytope", "bullseye_polytope"])
def test_the_distance_to_the_target_ends_below_a_fifth(name):
    params, data, known = problem(jnp.float32)
    reach = threat.perturb_rows(jnp.arange(K), radius=0.6)
    options = {} if name == "feature_collision" else {"optimizer": optax.adam(0.02)}
    algorithm = getattr(attacks, name)(features, threat=reach, **options)
    end, _ = combine.iterate(algorithm, 300)(jax.random.key(0), data, known)
    distance = bullseye if name == "bullseye_polytope" else lambda *args: np.sqrt(polytope(*args))
    start = distance(params, data.x[:K], known.goal)
    assert distance(params, end.x[:K], known.goal) <= start / 5


def test_bad_input_is_said():
    _, data, known = problem(jnp.float32)
    labels = threat.flip_labels(jnp.arange(2), budget=1.0)._replace(rows=None)
    with pytest.raises(ValueError, match=r"attacks\.bullseye_polytope: expected a threat with rows"):
        attacks.bullseye_polytope(features, threat=labels, optimizer=DESCEND)
    with pytest.raises(ValueError, match=r"attacks\.sleeper_agent: expected a threat with rows"):
        attacks.sleeper_agent(loss_fn, None, None, threat=labels, optimizer=DESCEND)
    with pytest.raises(ValueError, match="num_draws: expected an integer of at least 0"):
        attacks.convex_polytope(features, threat=FREE, optimizer=DESCEND, num_draws=-1)
    with pytest.raises(ValueError, match="optimizer: expected beta = opacity = 0"):
        attacks.feature_collision(features, threat=FREE, optimizer=DESCEND, beta=0.1)
    with pytest.raises(ValueError, match="num_draws: expected an optimizer"):
        attacks.feature_collision(features, threat=FREE, num_draws=2)
    with pytest.raises(ValueError, match="opacity: expected"):
        attacks.feature_collision(features, threat=FREE, opacity=1.5)
    with pytest.raises(ValueError, match=r"attacks.convex_polytope needs known\.params"):
        algorithm = attacks.convex_polytope(features, threat=FREE, optimizer=DESCEND)
        algorithm.init(jax.random.key(0), data, known.replace(params=None))


def test_matching_sees_every_poison_and_the_cosine_knows_no_scale():
    apply = lambda params, x, key=None: x @ params
    cosine = _matching.matcher(losses.cross_entropy(apply), None, 3, None)
    x = jax.random.normal(jax.random.key(0), (5, 2))
    params, aim = jnp.ones((2, 2)).at[0, 0].set(2.0), jnp.array([[1.0, -1.0], [0.5, 0.2]])
    slope = jax.jit(jax.grad(lambda x: cosine(jax.random.key(0), params, mj.dataset(x, jnp.array([0, 1, 0, 1, 0])), aim)))(x)
    assert jnp.all(jnp.any(slope != 0, axis=1))
    for scale in (3e10, 3e-15):
        np.testing.assert_allclose(_matching._cosine({"w": scale * aim}, {"w": scale * aim}), 1, rtol=1e-5)


@pytest.mark.parametrize("attack", [attacks.bullseye_polytope, attacks.convex_polytope])
def test_a_target_without_features_is_refused(attack):
    dead = lambda params, x, key=None: jax.nn.relu(x @ params)
    rows = mj.dataset(jnp.full((3, 2), 0.5), jnp.array([0, 0, 1]))
    known = mj.Known(params=-jnp.eye(2), goal=mj.dataset(jnp.ones((1, 2)), jnp.array([0])))
    made = attack(dead, threat=threat.perturb_rows(jnp.array([0, 1]), radius=0.1), optimizer=optax.adam(0.02))
    with pytest.raises(ValueError, match=r"known\.goal: expected features that are not all zero"):
        made.init(jax.random.key(0), rows, known)
