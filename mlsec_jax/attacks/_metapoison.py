"""MetaPoison: poisons from short unrolls over a staggered population of surrogates (Huang et al., NeurIPS 2020)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, tree
from mlsec_jax.attacks._bilevel import first_poison
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, LossFn, OuterFn, Params, Threat


class MetaPoisonState(NamedTuple):
    """The state of MetaPoison.

    Attributes:
      poison: what the threat lets the attacker choose.
      optimizer: the outer optimiser's state.
      surrogates: a `loop.State` with leading axis M.
      fixed: the surrogates' leaves that are not trained, leading axis M.
      epoch: `[M]`, how many epochs each surrogate has been trained.
    """

    poison: Any
    optimizer: Any
    surrogates: loop.State
    fixed: Params
    epoch: jax.Array


def metapoison(
    outer: OuterFn,
    loss_fn: LossFn,
    init_fn: Callable[[Key], Params],
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    inner_optimizer: optax.GradientTransformation,
    batch_size: int,
    num_surrogates: int = 8,
    num_epochs: int = 24,
    unroll: int = 2,
    over: str = "map",
) -> Algorithm:
    """Optimises poisons against networks at every stage of training, a few unrolled steps at a time.

    Each crafting step takes every surrogate through one epoch of clean training. From each state θ₀ on the way it
    looks ahead `θ₁ = u(θ₀, batch with poisons)`, `θ_{k+1} = u(θ_k, clean batch)`, and
    `min_poison mean_{m, batches} (1/K) Σ_{k=1..K} outer(θ_k, D, goal)`; then θ₀ advances on the clean batch. Surrogate
    m of M starts at epoch `m E / M` and is drawn anew when it has seen E epochs.

    Threat: changes - what `threat` says (`perturb_rows(rows, radius=8 / 255)`); sees - the training set, the victim's
    architecture and training recipe (`init_fn`, `inner_optimizer`), its targets with desired labels (`known.goal`);
    budget - the threat's; assumes - the victim trains from scratch, its initialisation unknown.

    Args:
      outer: `(params, data, goal) -> scalar`; `losses.goal_loss(losses.margin(apply_fn))` is the paper's.
      loss_fn: the surrogates' per-example training loss.
      init_fn: `key -> params`, a fresh surrogate.
      threat: on rows that are already in the data.
      optimizer: on the poison; Adam with a schedule is the paper's.
      inner_optimizer: the surrogates'.
      batch_size: static.
      num_surrogates: M, static; ignored if `known.surrogates` brings a stacked population, which is then taken as
        already staggered.
      num_epochs: E, static.
      unroll: K, static.
      over: the surrogates' axis, `"map"` or `"vmap"`.

    Returns:
      An `Algorithm`; info: `outer` (mean over the step), `gradient_norm`, `finite` (whether the gradient is: where it is
      not, because a surrogate diverged, the poison and the optimizer's state stay as they were), `epoch [M]`.

    References: Huang et al., NeurIPS 2020, algorithm 1, eq. (3)-(4). Deviates from the paper in: no recolouring in LUV
    space; the margin's runner-up is a true maximum over the other classes.
    """
    sizes = {"batch_size": batch_size, "num_surrogates": num_surrogates, "num_epochs": num_epochs, "unroll": unroll}
    for name, value in sizes.items():
        checks.count(name, value, 1)
    checks.one_of("over", over, ("map", "vmap"))

    spread = functools.partial(tree.each, over=over)

    def plan_of(subject: Data) -> loop.Loop:
        steps = subject.num_rows // batch_size
        return loop.sgd(loss_fn, inner_optimizer, max(steps, 1), batching=loop.shuffled(batch_size))

    def epoch_of(plan: loop.Loop, key: Key, state: loop.State, fixed: Params, subject: Data) -> loop.State:
        body = lambda carry, slot: (plan.step(carry, fixed, subject, slot), None)
        return jax.lax.scan(body, state, plan.slots(key, subject.num_rows))[0]

    def init(key: Key, subject: Data, known: Known) -> MetaPoisonState:
        checks.data("subject", subject)
        goal = known.require("goal", by="attacks.metapoison")
        if isinstance(goal, Data):
            checks.data("known.goal", goal)
        threat_key, net_key, train_key = jax.random.split(key, 3)
        poison, _ = first_poison(threat, threat_key, subject)
        plan = plan_of(subject)
        given = known.surrogates
        population = num_surrogates if given is None else jax.tree.leaves(given)[0].shape[0]
        index = jnp.arange(population)
        epoch = (index * num_epochs) // population

        def seasoned(m: jax.Array) -> tuple[loop.State, Params]:
            state, fixed = plan.init(init_fn(jax.random.fold_in(net_key, m)))
            mine = jax.random.fold_in(train_key, m)
            once = lambda e, now: epoch_of(plan, jax.random.fold_in(mine, e), now, fixed, subject)
            return jax.lax.fori_loop(0, epoch[m], once, state), fixed

        state, fixed = spread(seasoned, index) if given is None else jax.vmap(plan.init)(given)
        return MetaPoisonState(poison, optimizer.init(poison), state, fixed, epoch)

    def step(key: Key, state: MetaPoisonState, subject: Data, known: Known) -> tuple[MetaPoisonState, Info]:
        goal = known.require("goal", by="attacks.metapoison")
        plan = plan_of(subject)
        epoch_key, net_key = jax.random.split(key)

        def look_ahead(poison: Any, net: loop.State, fixed: Params, slots: Any, t: jax.Array) -> jax.Array:
            total = jnp.zeros(())
            data = threat.embed(poison, subject)
            num_slots = jax.tree.leaves(slots)[0].shape[0]
            for k in range(unroll):
                net = plan.step(net, fixed, data if k == 0 else subject, tree.take(slots, (t + k) % num_slots))
                with checks.naming("known.goal"):
                    value = outer(plan.read(net, fixed), data, goal)
                total = total.astype(value.dtype) + value
            return total / unroll

        def one(net: loop.State, fixed: Params, m: jax.Array) -> tuple[Any, loop.State]:
            slots = plan.slots(jax.random.fold_in(epoch_key, m), subject.num_rows)
            num_slots = jax.tree.leaves(slots)[0].shape[0]

            def body(now: loop.State, t: jax.Array) -> tuple[loop.State, Any]:
                found = jax.value_and_grad(look_ahead)(state.poison, now, fixed, slots, t)
                return plan.step(now, fixed, subject, tree.take(slots, t)), found

            now, found = jax.lax.scan(body, net, jnp.arange(num_slots))
            return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found), now

        population = jnp.arange(state.epoch.shape[0])
        found, nets = spread(one, state.surrogates, state.fixed, population)
        value, gradient = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), found)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        moved = threat.project(moved, subject)
        finite = tree.all_finite(gradient)
        moved, opt_state = tree.choose(finite, (moved, opt_state), (state.poison, state.optimizer))
        finished = state.epoch + 1 >= num_epochs
        fresh = spread(lambda m: plan.init(init_fn(jax.random.fold_in(net_key, m))), population)
        renew = lambda new, old: jnp.where(tree.per_row(finished, old), new, old)
        nets, fixed = jax.tree.map(renew, fresh, (nets, state.fixed))
        epoch = jnp.where(finished, 0, state.epoch + 1)
        report = {"outer": value, "gradient_norm": tree.norm(gradient), "finite": finite, "epoch": epoch}
        return MetaPoisonState(moved, opt_state, nets, fixed, epoch), report

    return Algorithm(init, step, lambda state, subject: threat.embed(state.poison, subject))
