"""Fine-pruning against a brute-force path in NumPy, a physically smaller network, and a backdoor built by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mlsec_jax as mj
from mlsec_jax import bilevel, channels, combine, defenses, losses
from tests import oracles

KEY = jax.random.key(0)


def hidden(params, x, key=None):
    return jax.nn.relu(x @ params["hidden"]["w"] + params["hidden"]["b"][None])


def apply_fn(params, x, key=None):
    return hidden(params, x) @ params["head"]["w"] + params["head"]["b"][None]


LAYER = channels.layer("hidden", hidden)


def fine_prune(*args, **options):
    """Compiled, as one program is quicker than many small ones."""
    return jax.jit(defenses.fine_prune(*args, **options))


def draw(seed=0, num_channels=7, dim=4, classes=3, n=40, dtype=np.float32):
    """Random parameters, and data labelled by them with some noise; weights differ and some are 0."""
    rng = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(dtype))
    params = {"hidden": {"w": array(dim, num_channels), "b": array(num_channels)},
              "head": {"w": array(num_channels, classes), "b": array(classes)}}  # fmt: skip

    def rows():
        x = array(n, dim)
        y = jnp.argmax(apply_fn(params, x) + 0.5 * array(n, classes), axis=1).astype(jnp.int32)
        weight = jnp.asarray(rng.choice([0.0, 0.5, 1.0, 2.0], n).astype(dtype))
        return mj.dataset(jnp.where((weight > 0)[:, None], x, jnp.nan), y, weight)

    return params, mj.Known(clean=rows(), holdout=rows())


def brute_force(params, known, budget):
    """Order, accuracies and the number pruned, one network after another."""
    w, b, v, c = (np.asarray(params[layer][leaf], np.float64) for layer in ("hidden", "head") for leaf in ("w", "b"))
    activations = lambda x: np.maximum(np.nan_to_num(np.asarray(x, np.float64)) @ w + b, 0)
    clean, holdout = known.clean, known.holdout
    order = np.argsort(np.average(activations(clean.x), axis=0, weights=np.asarray(clean.weight)), kind="stable")
    accuracy, num_pruned, broken = [], 0, False
    for level in range(len(order) + 1):
        left = np.setdiff1d(np.arange(len(order)), order[:level])
        logits = activations(holdout.x)[:, left] @ v[left] + c
        hit = logits.argmax(axis=1) == np.asarray(holdout.y)
        accuracy.append(np.average(hit, weights=np.asarray(holdout.weight)))
        broken |= accuracy[-1] < accuracy[0] - budget - 1e-6
        num_pruned = num_pruned if broken else level
    return order, accuracy, num_pruned


@pytest.mark.parametrize("budget", [0.0, 0.1, 0.3, 1.0])
def test_the_path_is_brute_forces(budget):
    repair = fine_prune(apply_fn, LAYER, budget=budget)
    for seed in range(4):
        params, known = draw(seed)
        changed, info = repair(KEY, params, known)
        order, accuracy, num_pruned = brute_force(params, known, budget)
        assert info["order"].tolist() == order.tolist()
        np.testing.assert_allclose(info["accuracy"], accuracy, atol=1e-6)
        assert int(info["num_pruned"]) == num_pruned and int(jnp.sum(~info["keep"])) == num_pruned
        gone, left = order[:num_pruned], order[num_pruned:]
        assert (np.asarray(changed["hidden"]["w"])[:, gone] == 0).all() and (np.asarray(changed["hidden"]["b"])[gone] == 0).all()
        np.testing.assert_array_equal(changed["hidden"]["w"][:, left], params["hidden"]["w"][:, left])
        assert oracles.trees_equal(changed["head"], params["head"])


def test_the_step_that_breaks_the_budget_is_not_kept_even_if_the_next_one_mends_it():
    """Two channels that cancel each other: without the first all is wrong, without both all is right again."""
    params = {"hidden": {"w": jnp.array([[0.1, 0.3, 0.4, 1.0]]), "b": jnp.zeros(4)},
              "head": {"w": jnp.array([[0.0, 0.0], [40.0, 0.0], [-30.0, 0.0], [0.0, 1.0]]), "b": jnp.zeros(2)}}  # fmt: skip
    rows = mj.dataset(jnp.linspace(1, 2, 10)[:, None], jnp.ones(10, jnp.int32))
    cancelled = params | {"head": {"w": -params["head"]["w"].at[3].multiply(-1), "b": params["head"]["b"]}}
    known = mj.Known(clean=rows, holdout=rows)
    changed, info = fine_prune(apply_fn, LAYER, budget=0.5)(KEY, cancelled, known)
    assert info["order"].tolist() == [0, 1, 2, 3]
    assert info["accuracy"].tolist() == [1, 1, 0, 1, 0]  # without channel 1 wrong, without 1 and 2 right again
    assert int(info["num_pruned"]) == 1
    assert float(jnp.mean(jnp.argmax(apply_fn(changed, rows.x), axis=1) == rows.y)) == 1


def test_a_fall_of_exactly_the_budget_is_within_it_and_none_is_free():
    params, known = draw(1)
    _, info = fine_prune(apply_fn, LAYER, budget=1.0)(KEY, params, known)
    falls = np.asarray(info["accuracy"][0] - info["accuracy"])
    assert falls[1] >= 0 and falls[:4].max() > 0
    _, exact = fine_prune(apply_fn, LAYER, budget=float(falls[:4].max()))(KEY, params, known)
    assert int(exact["num_pruned"]) >= 3
    changed, info = fine_prune(apply_fn, LAYER, budget=1.0, max_pruned=0)(KEY, params, known)
    assert oracles.trees_equal(changed, params) and info["accuracy"].shape == (1,)


def test_it_reads_clean_and_holdout_and_nothing_else():
    params, known = draw()
    repair = fine_prune(apply_fn, LAYER, budget=0.1, trainer_fn=tuner(optax.sgd(0.1)))
    other, elsewhere = draw(5)
    everything = known.replace(params=other, goal=elsewhere.clean, population=elsewhere.holdout, trigger=other)
    assert oracles.trees_equal(repair(KEY, params, known), repair(KEY, params, everything))
    moved = known.replace(clean=elsewhere.clean)
    assert not oracles.trees_equal(repair(KEY, params, known)[1]["order"], repair(KEY, params, moved)[1]["order"])


def test_absent_rows_are_absent():
    params, known = draw()
    drop = lambda rows: jax.tree.map(lambda leaf: leaf[np.asarray(rows.weight) > 0], rows)
    smaller = mj.Known(clean=drop(known.clean), holdout=drop(known.holdout))
    repair = fine_prune(apply_fn, LAYER, budget=0.1, trainer_fn=tuner(optax.sgd(0.1)))
    ours, expected = (repair(KEY, params, each) for each in (known, smaller))
    assert oracles.trees_close(ours[0], expected[0], atol=1e-5)
    assert ours[1]["order"].tolist() == expected[1]["order"].tolist()


def tuner(optimizer, num_steps=20):
    return lambda loss_fn: bilevel.unrolled(loss_fn, optimizer, num_steps)


@pytest.mark.parametrize("optimizer", [optax.sgd(0.3, momentum=0.9), optax.adam(0.05)], ids=["momentum", "adam"])
def test_fine_tuning_is_that_of_a_network_without_the_channels(optimizer):
    """Under a sigmoid, too, where a channel without weights isn't dead: gradients alone would revive it."""
    sigmoid = lambda params, x, key=None: jax.nn.sigmoid(x @ params["hidden"]["w"] + params["hidden"]["b"][None]) - 0.5
    outputs = lambda params, x, key=None: sigmoid(params, x) @ params["head"]["w"] + params["head"]["b"][None]
    params, known = draw(2)
    layer = channels.layer("hidden", sigmoid)
    repair = fine_prune(outputs, layer, budget=1.0, max_pruned=3, trainer_fn=tuner(optimizer))
    tuned, info = repair(KEY, params, known)
    gone, left = np.split(np.asarray(info["order"]), [3])
    assert int(info["num_pruned"]) == 3
    assert (np.asarray(tuned["hidden"]["w"])[:, gone] == 0).all() and (np.asarray(tuned["hidden"]["b"])[gone] == 0).all()
    small = lambda p: {"hidden": {"w": p["hidden"]["w"][:, left], "b": p["hidden"]["b"][left]},
                       "head": {"w": p["head"]["w"][left], "b": p["head"]["b"]}}  # fmt: skip
    expected, _ = jax.jit(tuner(optimizer)(losses.cross_entropy(outputs)))(KEY, small(params), known.clean)
    assert oracles.trees_close(small(tuned), expected, rtol=1e-4, atol=1e-5)
    assert oracles.trees_equal(tuned["head"]["w"][gone], params["head"]["w"][gone])
    mean_loss = losses.empirical(losses.cross_entropy(outputs))
    plain, _ = fine_prune(outputs, layer, budget=1.0, max_pruned=3)(KEY, params, known)
    assert float(mean_loss(tuned, known.clean)) < float(mean_loss(plain, known.clean))


def test_a_backdoor_in_a_dormant_channel_is_cut_and_pruning_the_busiest_does_not_help():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 200)
    x = np.concatenate([rng.normal(size=(200, 1)) * 0.3 + 2 * y[:, None] - 1, np.zeros((200, 1))], axis=1)
    rows = mj.dataset(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.int32))
    params = {"hidden": {"w": jnp.array([[1.0, -1.0, 0.0], [0.0, 0.0, 9.0]]), "b": jnp.array([0.0, 0.0, -4.0])},
              "head": {"w": jnp.array([[0.0, 5.0], [5.0, 0.0], [0.0, 9.0]]), "b": jnp.array([0.0, 1.0])}}  # fmt: skip
    stamped = rows.x[rows.y == 0].at[:, 1].set(1)
    success = lambda params: jnp.mean(jnp.argmax(apply_fn(params, stamped), axis=1) == 1)
    changed, info = fine_prune(apply_fn, LAYER, budget=0.02)(KEY, params, mj.Known(clean=rows, holdout=rows))
    assert float(success(params)) == 1 and float(success(changed)) < 0.02
    assert int(info["num_pruned"]) == 1 and float(info["accuracy"][1]) > 0.98
    busiest = channels.along(LAYER.prune_fn, params, info["order"][::-1], success)
    assert busiest[:3].tolist() == [1, 1, 1]


def test_it_composes_with_chain_masked_and_defended():
    params, known = draw()
    repair = fine_prune(apply_fn, LAYER, budget=0.2)
    alone, _ = repair(KEY, params, known)
    both, infos = jax.jit(combine.chain(repair, defenses.clip_weights(0.5)))(KEY, params, known)
    assert oracles.trees_equal(both, defenses.clip_weights(0.5)(KEY, alone, known)[0]) and len(infos) == 2
    whole = {**params, "average": params["head"], "step": jnp.int32(3)}
    ours, _ = combine.masked(repair, lambda path, leaf: path.startswith("h"))(KEY, whole, known)
    assert oracles.trees_equal(ours, {**whole, **alone})
    trainer = bilevel.unrolled(losses.cross_entropy(apply_fn), optax.sgd(0.1), 3)
    defended = jax.jit(combine.defended(trainer, after=(repair,), known=known))
    trained, info = defended(KEY, params, known.clean)
    assert (np.asarray(trained["hidden"]["b"])[~np.asarray(info["after"][0]["keep"])] == 0).all()


@pytest.mark.parametrize("gradient", ["hard", combine.soft(0.2)], ids=["hard", "soft"])
def test_its_derivative_is_central_differences(gradient):
    with jax.enable_x64(True):
        params, known = draw(3, dtype=np.float64)
        repair = fine_prune(apply_fn, LAYER, budget=0.2, gradient=gradient, trainer_fn=tuner(optax.sgd(0.1), 3))
        assert int(repair(KEY, params, known)[1]["num_pruned"]) > 0
        mean_loss = losses.empirical(losses.cross_entropy(apply_fn))
        start = lambda w: {**params, "hidden": {**params["hidden"], "w": w}}
        value = jax.jit(lambda w: mean_loss(repair(KEY, start(w), known)[0], known.holdout))
        assert oracles.relative_error(value, params["hidden"]["w"]) < 1e-6


def test_straight_through_is_the_hard_value_with_a_derivative_in_the_choice():
    params, known = draw(3)
    build = lambda gradient: fine_prune(apply_fn, LAYER, budget=0.2, gradient=gradient)
    hard, through = build("hard"), build(combine.straight_through(0.2))
    assert oracles.trees_close(hard(KEY, params, known)[0], through(KEY, params, known)[0])
    slope = lambda repair: jax.grad(lambda p: jnp.sum(repair(KEY, p, known)[0]["hidden"]["w"]))(params)["hidden"]["b"]
    assert float(jnp.max(jnp.abs(slope(hard)))) == 0 < float(jnp.max(jnp.abs(slope(through))))


def test_bad_input_is_named():
    params, known = draw()
    with pytest.raises(ValueError, match="budget: expected at least 0"):
        defenses.fine_prune(apply_fn, LAYER, budget=-0.1)
    with pytest.raises(ValueError, match="gradient: expected 'hard'"):
        defenses.fine_prune(apply_fn, LAYER, gradient="soft")
    with pytest.raises(ValueError, match="max_pruned: expected at most the layer's 7 channels, got 8"):
        defenses.fine_prune(apply_fn, LAYER, max_pruned=8)(KEY, params, known)
    for field in ("clean", "holdout"):
        with pytest.raises(ValueError, match=f"defenses.fine_prune needs known.{field}"):
            defenses.fine_prune(apply_fn, LAYER)(KEY, params, known.replace(**{field: None}))
    empty = known.holdout._replace(weight=jnp.zeros_like(known.holdout.weight))
    with pytest.raises(ValueError, match=r"known\.holdout: expected at least one row of positive weight"):
        defenses.fine_prune(apply_fn, LAYER)(KEY, params, known.replace(holdout=empty))
