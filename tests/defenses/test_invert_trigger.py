"""Trigger reconstruction on models whose smallest trigger is known, its terms against NumPy, its schedule replayed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mlsec_jax as mj
from mlsec_jax import defenses, measure, threat
from mlsec_jax.defenses import _invert_trigger

KEY = jax.random.key(0)
SIDE, PLACE = 6, np.array([28, 29, 34, 35])  # the bottom right 2 x 2 of 6 x 6


def linear(params, x, key=None):
    return x.reshape(x.shape[0], -1) @ params["w"] + params["b"][None]


def backdoored(dtype=jnp.float32):
    """Three classes; clean images are black in the corner, so the smallest trigger of each label is in closed form.

    Class 0 is what everything is taken for. Class 1 needs `4 Σ_{corner} x > 6`: 1.5 bright pixels there. Class 2 needs
    `Σ_{elsewhere} x > 12`: 12 bright pixels in place of dark ones.
    """
    w = np.zeros((SIDE * SIDE, 3))
    w[PLACE, 1] = 4
    w[np.setdiff1d(np.arange(SIDE * SIDE), PLACE), 2] = 1
    return {"w": jnp.asarray(w, dtype), "b": jnp.asarray([0.0, -6.0, -12.0], dtype)}


def rows(n=30, dtype=jnp.float32, bright=0.0):
    """Almost black images, so that 2 is far; `y` is arbitrary."""
    x = np.random.default_rng(0).uniform(0, 0.01, size=(n, SIDE * SIDE))
    x[:, PLACE] = bright
    return mj.dataset(jnp.asarray(x.reshape(n, SIDE, SIDE, 1), dtype), jnp.arange(n, dtype=jnp.int32) % 3)


def inverter(objective=None, **options):
    options = {"num_steps": 300, "num_batches": 1, "batch_size": 16, **options}
    return defenses.invert_trigger(
        linear, num_classes=3, objective=objective or defenses.neural_cleanse(), **options
    )


OBJECTIVES = pytest.mark.parametrize("objective", [defenses.neural_cleanse(), defenses.tabor()], ids=["nc", "tabor"])


@OBJECTIVES
def test_the_smallest_trigger_is_found_where_it_is(objective):
    record = jax.jit(inverter(objective))(KEY, backdoored(), mj.Known(clean=rows()))
    assert record.found.all() and (record.success >= 0.99).all()
    size = np.asarray(record.size)
    assert 1.5 <= size[1] <= 1.9 and 11.5 <= size[2] <= 15.5
    mask = np.asarray(record.mask[1]).reshape(-1)
    assert mask[PLACE].sum() / mask.sum() > 0.95
    assert np.asarray(record.pattern[1]).reshape(-1)[PLACE][mask[PLACE] > 0.1].min() > 0.9
    assert measure.anomaly_index(record.metric)[1] >= measure.anomaly_index(record.metric)[2]


def test_without_the_backdoor_the_label_is_as_far_as_another():
    clean = backdoored()
    clean["w"] = clean["w"].at[:, 1].set(jnp.where(jnp.arange(SIDE * SIDE) % 2 == 0, 1.5, 0.0))
    clean["b"] = clean["b"].at[1].set(-18.0)  # 12 bright pixels too
    record = jax.jit(inverter())(KEY, clean, mj.Known(clean=rows()))
    assert 11.5 <= record.size[1] <= 15.5
    assert np.asarray(record.mask[1]).reshape(-1)[PLACE].sum() / record.size[1] < 0.3


@OBJECTIVES
@pytest.mark.slow
def test_labels_together_are_labels_alone(objective):
    known = mj.Known(clean=rows())
    alone = jax.jit(inverter(objective, num_steps=60, labels=[1]))(KEY, backdoored(), known)
    assert alone.label.tolist() == [1]
    for over in ("map", "vmap"):
        together = jax.jit(inverter(objective, num_steps=60, labels=[2, 1], over=over))(KEY, backdoored(), known)
        for ours, theirs in zip(together, alone):
            np.testing.assert_allclose(ours[1], theirs[0], rtol=1e-4, atol=1e-5)


def test_a_search_stops_by_itself_and_a_hopeless_one_says_so():
    params = backdoored()
    params["b"] = params["b"].at[2].set(-100.0)  # out of reach for all 32 pixels
    record = jax.jit(inverter())(KEY, params, mj.Known(clean=rows()))
    assert record.num_steps[1] < 300 and record.num_steps[2] == 300
    assert record.found.tolist() == [True, True, False] and record.success[2] == 0
    assert np.isfinite(record.metric).all()


def published(cost_first, multiplier, patience, early_stop, steps):
    """The control flow of `visualizer.py` in github.com/bolunwang/backdoor, on a list of (success reached, size)."""
    cost, first, up, down, was_up, was_down, best, stalled, stop_best, out = 0.0, 0, 0, 0, False, False, np.inf, 0, np.inf, []
    for reached, size in steps:
        if reached and size < best:
            best = size
        if best < np.inf:
            stalled = stalled + 1 if best >= stop_best else 0
        stop_best = min(best, stop_best)
        if was_down and was_up and stalled >= early_stop:
            break
        if cost == 0 and reached:
            first += 1
            if first >= patience:
                cost, up, down, was_up, was_down = cost_first, 0, 0, False, False
        else:
            first = 0
        up, down = (up + 1, 0) if reached else (0, down + 1)
        if up >= patience:
            up, cost, was_up = 0, cost * multiplier, True
        elif down >= patience:
            down, cost, was_down = 0, cost / multiplier**1.5, True
        out.append((cost, best))
    return out


def test_the_schedule_is_the_published_codes():
    rule = _invert_trigger.Rule(1e-3, 2.0, 3, 6)
    for seed in range(6):
        rng = np.random.default_rng(seed)
        steps = [(bool(rng.random() < p), float(np.float32(rng.random()))) for p in np.repeat(rng.random(30), 8)]
        expected = published(1e-3, 2.0, 3, 6, steps)
        state, ours = rule.start(jnp.float32), []
        for reached, size in steps:
            state = rule.move(state, jnp.asarray(reached), jnp.float32(size))
            if state.stop:
                break
            ours.append((float(state.cost), float(state.best)))
        assert len(ours) == len(expected)
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
    assert len(expected) < len(steps) and any(cost > 1e-3 for cost, _ in expected)


def numpy_terms(params, mask, pattern, x, y, label):
    """Attack loss, the six terms as the paper numbers them, and the metric, by loops over pixels."""
    w, b = np.asarray(params["w"]), np.asarray(params["b"])
    logits = lambda x: x.reshape(len(x), -1) @ w + b

    def entropy(x, labels):
        out = logits(x)
        return np.mean(np.log(np.exp(out).sum(axis=1)) - out[np.arange(len(x)), labels])

    def rough(v):
        h, width = v.shape[:2]
        total = 0.0
        for i in range(h):
            for j in range(width):
                total += np.sum((v[i, j] - v[i, j + 1]) ** 2) if j + 1 < width else 0
                total += np.sum((v[i, j] - v[i + 1, j]) ** 2) if i + 1 < h else 0
        return total

    m = mask[:, :, None]
    stamped, outside, cropped = (1 - m) * x + m * pattern, (1 - m) * pattern, (1 - m) * x
    elastic = lambda v: np.abs(v).sum() + (v**2).sum()
    everyone = np.full(len(x), label)
    sizes = [elastic(mask), elastic(outside), rough(mask), rough(outside)]
    terms = [*sizes, entropy(cropped, y), entropy((m * pattern)[None], [label])]
    area = max(1, round(mask.sum()))
    explained = np.zeros_like(stamped)
    for i, row in enumerate(stamped):
        saliency = np.abs(row.reshape(-1) * w[:, label])
        for j in np.argsort(-saliency)[:area]:
            explained[i].reshape(-1)[j] = row.reshape(-1)[j]
    said = lambda x: logits(x).argmax(axis=1)
    other = y != label
    shares = [(said(stamped) == label)[other].mean(), (said(cropped) == y).mean(), (said(explained) == label)[other].mean()]
    d = mask.shape[0]
    metric = np.log(mask.sum() / d**2) + np.log(rough(mask) / (d * (d - 1)))
    return entropy(stamped, everyone), terms, metric - sum(np.log(max(share, 0.5 / len(x))) for share in shares)


def problem64(seed=0):
    rng = np.random.default_rng(seed)
    params = {"w": rng.normal(size=(SIDE * SIDE, 3)), "b": rng.normal(size=3)}
    mask, pattern, x = (rng.random(shape) for shape in ((SIDE, SIDE), (SIDE, SIDE, 1), (9, SIDE, SIDE, 1)))
    return jax.tree.map(jnp.asarray, params), mask * (mask > 0.6), pattern, x, np.arange(9) % 3


def test_the_terms_are_numpys():
    with jax.enable_x64(True):
        params, mask, pattern, x, y = problem64()
        overlay = threat.Overlay(jnp.asarray(mask), jnp.asarray(pattern))
        batch = mj.dataset(jnp.asarray(x), jnp.asarray(y, jnp.int32))
        model_fn = lambda x: linear(params, x)
        attack, terms, metric = numpy_terms(params, mask, pattern, x, y, 2)
        loss, penalty, _ = defenses.neural_cleanse().loss_fn(model_fn, overlay, batch, jnp.int32(2))
        np.testing.assert_allclose([loss, penalty], [attack, mask.sum()], rtol=1e-10)
        for k, term in enumerate(terms):
            objective = defenses.tabor(weights=np.eye(6)[k])
            loss, penalty, logits = objective.loss_fn(model_fn, overlay, batch, jnp.int32(2))
            np.testing.assert_allclose([loss, penalty], [attack, term] if k < 4 else [attack + term, 0], rtol=1e-10)
            np.testing.assert_allclose(logits, linear(params, overlay(None, batch.x)), rtol=1e-10)
        np.testing.assert_allclose(objective.metric_fn(model_fn, overlay, batch, jnp.int32(2)), metric, rtol=1e-10)


def test_a_checkerboard_is_as_rough_as_can_be():
    """The third-party code lost one of the two directions: a stripe of either must cost as much, a checkerboard both."""
    row, column = np.meshgrid(np.arange(SIDE) % 2, np.arange(SIDE) % 2, indexing="ij")
    batch = mj.dataset(jnp.zeros((1, SIDE, SIDE, 1)), jnp.zeros(1, jnp.int32))
    objective = defenses.tabor(weights=(0, 0, 1, 0, 0, 0))

    def rough(mask):
        overlay = threat.Overlay(jnp.asarray(mask, jnp.float32), jnp.zeros((SIDE, SIDE, 1)))
        return float(objective.loss_fn(lambda x: linear(backdoored(), x), overlay, batch, 0)[1])

    pairs = SIDE * (SIDE - 1)
    assert [rough(row), rough(column), rough(row ^ column), rough(0 * row)] == [pairs, pairs, 2 * pairs, 0]


def test_an_overlay_is_a_patch_without_a_place():
    pattern, mask = jnp.arange(8.0).reshape(2, 2, 2) / 8, jnp.array([[0.0, 0.3], [1.0, 0.5]])
    x = jax.random.uniform(KEY, (3, 2, 2, 2))
    expected = threat.patch(pattern, at=(0, 0), mask=mask)(None, x)
    np.testing.assert_allclose(threat.Overlay(mask, pattern)(None, x), expected, rtol=1e-6)
    np.testing.assert_allclose(threat.Overlay(jnp.stack([mask, mask], axis=2), pattern)(None, x), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="rows of the pattern's shape"):
        threat.Overlay(mask, pattern)(None, x[:, :1])


def test_bad_input_is_named():
    for options, match in [
        ({"labels": [3]}, "labels: expected some of 0 to 2"),
        ({"labels": []}, "labels: expected some"),
        ({"multiplier": 1.0}, "multiplier: expected more than 1"),
        ({"success": 1.2}, "success: expected between"),
        ({"patience": 0}, "patience: expected an integer"),
        ({"over": "pmap"}, "over: expected one of"),
    ]:
        with pytest.raises(ValueError, match=match):
            inverter(**options)
    with pytest.raises(ValueError, match="weights: expected six"):
        defenses.tabor(weights=(1, 2))
    with pytest.raises(ValueError, match=r"needs known\.clean"):
        inverter()(KEY, backdoored(), mj.Known())
    flat = rows()._replace(x=rows().x.reshape(30, -1))
    with pytest.raises(ValueError, match=r"known\.clean: expected images"):
        inverter()(KEY, backdoored(), mj.Known(clean=flat))
    with pytest.raises(ValueError, match=r"labels in \[0, 3\)"):
        inverter()(KEY, backdoored(), mj.Known(clean=rows()._replace(y=jnp.full(30, 5))))
    with pytest.raises(ValueError, match="while_loop"):
        value = lambda params: jnp.sum(inverter(num_steps=2)(KEY, params, mj.Known(clean=rows())).size)
        jax.eval_shape(jax.grad(value), backdoored())
