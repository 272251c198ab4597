"""Sleeper Agent: gradient matching for a hidden trigger, the surrogate retrained on the way (Souri et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, tree
from mlsec_jax.attacks import _craft, _matching
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, LossFn, Params, Threat

Trigger = Callable[[Key, Any], Any]  # (key, x [n, ...]) -> x with the trigger, wherever the key puts it


class SleeperState(NamedTuple):
    """The state of Sleeper Agent.

    Attributes:
      poison: the poisons' inputs, `[k, ...]`.
      optimizer: the optimiser's state.
      surrogate: the parameters of the network in which gradients are matched now.
      aim: the attacker's gradient in that network.
      step: how many steps were taken.
    """

    poison: Any
    optimizer: Any
    surrogate: Params
    aim: Params
    step: jax.Array


def sleeper_agent(
    loss_fn: LossFn,
    trainer: Any,
    trigger_fn: Trigger,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    retrain_every: int = 50,
    augment_fn: _matching.Augment | None = None,
    batch_size: int | None = None,
    trainable: tree.Where = None,
) -> Algorithm:
    """Clean-label poisons without a visible trigger, after which a trigger at test time sends one class to another.

    `min 1 - cos(∇_θ mean_s ℓ(s ⊕ trigger, y_adv), ∇_θ mean_j ℓ(a(x_j), y_j))`, where θ is a surrogate that is trained
    from scratch on the poisoned data at the start and after every `retrain_every` steps.

    Threat: changes - the inputs of the threat's rows (`largest_gradients` chooses them), whose label, the class that
    triggered inputs are to be taken for, stays; sees - the training set, the victim's architecture and recipe
    (`trainer`, `known.params` to start from), source inputs without trigger, labelled as the attacker wants them
    (`known.goal`); budget - the threat's, 16/255 in l-inf and 1 % of the rows in the paper; assumes - the victim trains
    from scratch.

    Args:
      loss_fn: per-example training loss, `(params, data, key) -> [n]`.
      trainer: of the surrogate, `(key, params, data) -> (params, info)`; it is not differentiated.
      trigger_fn: `(key, x) -> x`, stamps the trigger; drawn anew for every aim.
      threat: `perturb_rows(rows, radius=…)`.
      optimizer: the paper's is Adam on the sign of the gradient.
      retrain_every: static; larger than the number of steps for no retraining.
      augment_fn: `(key, data) -> data`, what the victim is expected to do to its batches.
      batch_size: static; as in `gradient_matching`.
      trainable: the parameters whose gradient is matched; the default is all.

    Returns:
      An `Algorithm`; info: `outer`, `gradient_norm`, `cosine`, `retrained`. Under `vmap` every step pays for a training.

    References: Souri et al., NeurIPS 2022, eq. (4), algorithm 1. Deviates from the paper in: a batch holds poisons only.
    """
    checks.count("retrain_every", retrain_every, 1)
    by = "attacks.sleeper_agent"
    rows = _craft.rows_of(threat, by)
    cosine = _matching.matcher(loss_fn, augment_fn, batch_size, trainable)

    def retrain(key: Key, poison: Any, subject: Data, known: Known) -> tuple[Params, Params]:
        train_key, trigger_key = jax.random.split(key)
        surrogate, _ = trainer(train_key, known.require("params", by), threat.embed(poison, subject))
        goal = _craft.target(known, by, subject)
        triggered = goal._replace(x=trigger_fn(trigger_key, goal.x))
        return surrogate, _matching.gradient(loss_fn, surrogate, triggered, trainable)

    def init(key: Key, subject: Data, known: Known) -> SleeperState:
        checks.data("subject", subject)
        threat_key, train_key = jax.random.split(key)
        poison = threat.project(threat.init(threat_key, subject), subject)
        surrogate, aim = retrain(train_key, poison, subject, known)
        return SleeperState(poison, optimizer.init(poison), surrogate, aim, jnp.zeros((), jnp.int32))

    def step(key: Key, state: SleeperState, subject: Data, known: Known) -> tuple[SleeperState, Info]:
        _craft.target(known, by, subject)
        train_key, match_key = jax.random.split(key)
        due = (state.step > 0) & (state.step % retrain_every == 0)
        anew = lambda: retrain(train_key, state.poison, subject, known)
        surrogate, aim = jax.lax.cond(due, anew, lambda: (state.surrogate, state.aim))

        def loss(poison: Any) -> jax.Array:
            return 1 - cosine(match_key, surrogate, tree.take(threat.embed(poison, subject), rows), aim)

        value, gradient = jax.value_and_grad(loss)(state.poison)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        moved = threat.project(moved, subject)
        report = {"outer": value, "gradient_norm": tree.norm(gradient), "cosine": 1 - value, "retrained": due}
        return SleeperState(moved, opt_state, surrogate, aim, state.step + 1), report

    return _craft.unless_empty(rows, Algorithm(init, step, lambda state, subject: threat.embed(state.poison, subject)))
