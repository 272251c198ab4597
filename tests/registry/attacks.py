"""The attacks, once each."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import attacks, bilevel, losses, threat
from tests import problems
from tests.registry._row import MOMENTUM, TRIGGERS, Row, features, logits, perturb, seen, unrolled

ADAM = optax.adam(0.03)


def _append(problem):
    return threat.append_rows(problem.reserved)


def _attack(factory):
    """The row of a preset of `bilevel`, on perturbed rows."""

    def build(problem, radius, rows=None):
        reach = perturb(problem, radius)
        return factory(problem.loss_fn, unrolled(problem), threat=reach, optimizer=attacks.unit_rows(0.1))

    return build


def _nothing(factory):
    return lambda problem: _attack(factory)(problem, 0.0)


def _preset(name, factory, **options):
    return Row(name, "attack", _attack(factory), zero=_nothing(factory), project=perturb, **options)


def _bilevel(problem, step_size):
    outer = losses.goal_loss(problem.loss_fn)
    return attacks.bilevel(outer, unrolled(problem), threat=_append(problem), optimizer=attacks.unit_rows(step_size))


def _regression_attack(problem, step_size):
    optimizer = attacks.unit_rows(step_size)
    return attacks.linear_regression(problem.apply_fn, threat=_append(problem), optimizer=optimizer, l2=0.1)


def _influence_images(problem, radius):
    head = bilevel.implicit(losses.regularised(problem.loss_fn, l2=0.1, penalise=None))
    features = lambda params, x, key=None: x * params
    return attacks.influence_images(features, problem.loss_fn, head, threat=perturb(problem, radius), step_size=0.02)


def _kkt_sanitized(problem, num_poisons):
    hinge = losses.hinge(problem.apply_fn, temperature=0.1)
    trainer = bilevel.unrolled(hinge, optax.sgd(0.3), 10)
    grid = {"quantiles": (0.2,), "copies": (3.0,), "splits": (0.5,), "num_steps": 20, "num_sweeps": 5}
    return attacks.kkt_sanitized(problem.apply_fn, trainer, num_poisons=num_poisons, l2=0.1, **grid)


def _transferred(problem):
    params = attacks.Transferred(jnp.ones((), problem.train.x.dtype), problem.params)
    return problem._replace(known=problem.known.replace(params=params))


def _metapoison(problem, radius):
    init_fn = lambda key: jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype), problem.params
    )
    return attacks.metapoison(
        losses.goal_loss(problem.loss_fn),
        problem.loss_fn,
        init_fn,
        threat=perturb(problem, radius),
        optimizer=optax.sgd(0.5),
        inner_optimizer=optax.sgd(0.5),
        batch_size=7,
        num_surrogates=2,
        num_epochs=3,
    )


def _crafting(name, factory, **options):
    """The row of a clean-label attack in the network of `seen`."""

    def build(problem, radius):
        return factory(problem, threat=perturb(problem, radius))

    zero = lambda problem: build(problem, 0.0)
    return Row(name, "attack", build, problem=seen, zero=zero, project=perturb, **options)


def _sleeper(problem, **reach):
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 3)
    trigger = lambda key, x: x.at[:, 0].set(1)
    return attacks.sleeper_agent(problem.loss_fn, trainer, trigger, optimizer=ADAM, retrain_every=10, **reach)


def _hidden(pairing):
    """The row's factory, with the trigger of rows that are no images."""

    def factory(problem, **reach):
        return attacks.hidden_trigger(features, TRIGGERS["blend"](0.1), optimizer=ADAM, pairing=pairing, **reach)

    return factory


def _one_source_a_poison(row):
    """The same row, with as many goal rows as the threat has."""

    def problem(given):
        seen = row.problem(given)
        goal = jax.tree.map(lambda leaf: leaf[: seen.touched.size], seen.known.goal)
        return seen._replace(known=seen.known.replace(goal=goal))

    return dataclasses.replace(row, problem=problem)


def _label_consistent(problem, radius, opacity=0.3):
    reach = perturb(problem, radius, "l2")
    trigger = TRIGGERS["blend"](opacity)
    return attacks.label_consistent(problem.loss_fn, trigger, threat=reach, optimizer=attacks.unit_rows(0.1))


def _pruning_aware(problem, margin, num_pruned=1, num_steps=5):
    return attacks.pruning_aware(
        problem.loss_fn,
        logits(problem),
        poison=attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=3, relabel=threat.to_class(0)),
        trainer_fn=lambda loss_fn: bilevel.unrolled(loss_fn, MOMENTUM, num_steps),
        num_pruned=num_pruned,
        margin=margin,
    )


ROWS = [
    Row("attacks.bilevel", "attack", _bilevel, project=_append, budget=0.2),
    _preset("attacks.error_specific", attacks.error_specific),
    _preset("attacks.targeted", attacks.targeted),
    _preset("attacks.availability", attacks.availability),
    Row(
        "attacks.linear_regression", "attack", _regression_attack, problem=problems.regression, project=_append, budget=0.1
    ),
    Row(
        "attacks.svm_kkt",
        "attack",
        lambda problem, step_size: attacks.svm_kkt(threat=_append(problem), C=1.0, step_size=step_size),
        problem=problems.binary,
        project=_append,
        budget=0.1,
    ),
    Row(
        "attacks.influence_images",
        "attack",
        _influence_images,
        problem=_transferred,
        zero=lambda problem: _influence_images(problem, 0.0),
        project=perturb,
    ),
    Row(
        "attacks.metapoison",
        "attack",
        _metapoison,
        zero=lambda problem: _metapoison(problem, 0.0),
        project=perturb,
        full_batch=False,
        lowers=False,  # each step sees other surrogates; tests/attacks compares victims instead
    ),
    _crafting("attacks.feature_collision", lambda p, **reach: attacks.feature_collision(features, beta=0.01, **reach)),
    _crafting(
        "attacks.convex_polytope", lambda p, **reach: attacks.convex_polytope(features, optimizer=ADAM, **reach)
    ),
    _crafting(
        "attacks.bullseye_polytope", lambda p, **reach: attacks.bullseye_polytope(features, optimizer=ADAM, **reach)
    ),
    _crafting(
        "attacks.gradient_matching", lambda p, **reach: attacks.gradient_matching(p.loss_fn, optimizer=ADAM, **reach)
    ),
    _crafting("attacks.sleeper_agent", _sleeper),
    _crafting("attacks.hidden_trigger", _hidden("greedy")),
    _crafting("attacks.hidden_trigger(optimal)", _hidden("optimal")),
    _one_source_a_poison(_crafting("attacks.hidden_trigger(faithful)", _hidden("faithful"))),
    Row(
        "attacks.label_consistent",
        "attack",
        _label_consistent,
        problem=seen,
        zero=lambda problem: _label_consistent(problem, 0.0, opacity=0.0),
        project=lambda problem: perturb(problem, 0.3, "l2"),
        targeted=False,  # the goal is the class of the rows
    ),
    Row(
        "attacks.badnets",
        "transform",
        lambda problem, _: attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=3, relabel=threat.to_class(0)),
        zero=lambda problem: attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=0, relabel=threat.to_class(0)),
        targeted=False,
        full_batch=False,
    ),
    Row(
        "attacks.flip_random",
        "transform",
        lambda problem, _: attacks.flip_random(num_flips=3, num_classes=3),
        zero=lambda problem: attacks.flip_random(num_flips=0, num_classes=3),
        targeted=False,
        full_batch=False,
    ),
    Row(
        "attacks.flip_margin",
        "transform",
        lambda problem, _: attacks.flip_margin(problem.apply_fn, num_flips=3),
        zero=lambda problem: attacks.flip_margin(problem.apply_fn, num_flips=0),
        problem=lambda p: p._replace(known=p.known.replace(params={**p.params, "w": jnp.eye(4, 3)})),
        targeted=False,
    ),
    Row(
        "attacks.flip_greedy",
        "transform",
        lambda problem, _: attacks.flip_greedy(
            losses.goal_loss(problem.loss_fn), unrolled(problem), num_flips=2, num_classes=3
        ),
        zero=lambda problem: attacks.flip_greedy(
            losses.goal_loss(problem.loss_fn), unrolled(problem), num_flips=0, num_classes=3
        ),
    ),
    Row(
        "attacks.flip_alfa",
        "transform",
        lambda problem, _: attacks.flip_alfa(problem.loss_fn, unrolled(problem), num_flips=2, num_classes=3, num_rounds=3),
        zero=lambda problem: attacks.flip_alfa(problem.loss_fn, unrolled(problem), num_flips=0, num_classes=3, num_rounds=3),
        targeted=False,
    ),
    Row(
        "attacks.kkt_sanitized",
        "transform",
        lambda problem, _: _kkt_sanitized(problem, problems.POISONS),
        problem=problems.binary,
        zero=lambda problem: _kkt_sanitized(problem, 0),
        targeted=False,  # it reads the holdout, not a goal
    ),
    Row(
        "attacks.pruning_aware",
        "repair",  # of nothing, but a transform of parameters
        _pruning_aware,
        zero=lambda problem: _pruning_aware(problem, 0.3, num_pruned=0, num_steps=0),
    ),
]
