"""Label-consistent backdoor: target-class images made hard to learn, then stamped; labels stay (Turner et al. 2019)."""

from __future__ import annotations

import jax
import optax

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.attacks import _craft
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, LossFn, Threat
from mlsec_jax.threat import Trigger, backdoor


def label_consistent(
    loss_fn: LossFn,
    trigger: Trigger,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    place_key: Key | None = None,
) -> Algorithm:
    """Takes from images what shows their class, so that the trigger is what is left to learn.

    `x' = x + argmax_{‖δ‖ ≤ ε} ℓ(x + δ, y)` in a network that was trained robustly, by projected gradient ascent, and then
    `x' ⊕ trigger`. The trigger is stamped after the perturbation and isn't bounded by ε.

    Threat: changes - the inputs of the threat's rows, which are of the class that triggered inputs are to be taken for;
    labels stay, and are true; sees - a network of its own (`known.params`), best an adversarially trained one: perturbations
    against a network that is not robust hide far less of the class; budget - the threat's (300 in l2 of 0 to 255 in the paper),
    and the trigger, in plain sight; assumes - the victim trains from scratch, and its augmentation leaves the trigger in place
    (`threat.corners` for one that mirrors).

    Args:
      loss_fn: per-example loss of that network.
      trigger: what is stamped, at full strength as at test time.
      threat: `perturb_rows(rows, radius=…, norm="l2")` on rows of the target class; `noise` for a random start.
      optimizer: on the poisons; `attacks.unit_rows(step)` is projected gradient ascent in l2.
      place_key: where triggers of random place are put.

    Returns:
      An `Algorithm`; info: `outer` (minus the mean loss), `gradient_norm`, `loss [k]`.

    References: Turner, Tsipras & Madry, arXiv:1912.02771, section 4. Deviates from the paper in: perturbations only, no
    interpolation by a generative model.
    """
    by = "attacks.label_consistent"
    rows = _craft.rows_of(threat, by)
    stamp = backdoor(trigger, rows, relabel=None, place_key=place_key)

    def init(key: Key, subject: Data, known: Known) -> _craft.CraftState:
        del known
        checks.data("subject", subject)
        poison = threat.project(threat.init(key, subject), subject)
        return _craft.CraftState(poison, optimizer.init(poison), ())

    def step(key: Key, state: _craft.CraftState, subject: Data, known: Known) -> tuple[_craft.CraftState, Info]:
        del key
        params = known.require("params", by)

        def outer(poison: jax.Array) -> tuple[jax.Array, jax.Array]:
            poisons = tree.take(threat.embed(poison, subject), rows)
            loss = loss_fn(params, losses.present(poisons))
            return -losses.weighted_mean(loss, poisons.weight), loss

        (value, loss), gradient = jax.value_and_grad(outer, has_aux=True)(state.poison)
        moved, opt_state = loop.apply_optimizer(optimizer, gradient, state.optimizer, state.poison)
        report = {"outer": value, "gradient_norm": tree.norm(gradient), "loss": loss}
        return _craft.CraftState(threat.project(moved, subject), opt_state, ()), report

    def read(state: _craft.CraftState, subject: Data) -> Data:
        return stamp.embed(trigger.pattern, threat.embed(state.poison, subject))

    return Algorithm(init, step, read)
