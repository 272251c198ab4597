"""A goal, an inner loss and a reach of your own, attacked with no change to the library.

The attacker may lift the weight of some training rows and brighten their inputs by one common factor; the victim trains
a robust (Huber) loss; the attacker wants the error rates of two groups to diverge.
"""

import jax
import jax.numpy as jnp
import optax

import mlsec_jax as mj
from mlsec_jax import attacks, bilevel, combine, losses


def model(params, x, key=None):
    """A linear score."""
    return x @ params["w"] + params["b"]


# [ten-lines]
def huber(params, data, key=None):
    """Your own inner loss, per example `[n]`."""
    return optax.huber_loss(model(params, data.x), 2.0 * data.y - 1.0)


def divergence(params, data, goal):
    """Your own goal, minimised: group 1 errs (softly) and group 0 does not."""
    errs = jax.nn.sigmoid(-5.0 * (2.0 * goal["y"] - 1.0) * model(params, goal["x"]))
    return losses.weighted_mean(errs, 1.0 - goal["group"]) - losses.weighted_mean(errs, goal["group"])


def reweigh_and_brighten(rows):
    """Your own reach: any pytree can be the poison."""

    def embed(poison, data):
        x = data.x.at[rows].multiply(poison["factor"], unique_indices=True)
        return data._replace(x=x, weight=data.weight.at[rows].set(poison["weight"]))

    start = lambda key, data: {"factor": jnp.ones(()), "weight": data.weight[rows]}
    project = lambda p, data: {"factor": jnp.clip(p["factor"], 0.5, 1.5), "weight": jnp.clip(p["weight"], 0.0, 4.0)}
    return mj.Threat(start, project, embed)


def attack(rows):
    """The attack: assembled from the three, like any of the library's own."""
    trainer = bilevel.unrolled(huber, optax.sgd(0.3), 40)
    return attacks.bilevel(divergence, trainer, threat=reweigh_and_brighten(rows), optimizer=optax.adam(0.1))
# [/ten-lines]


def groups(key, num_rows):
    """Two groups of the same size whose best classifiers differ; group 1 relies on the second feature."""
    group_key, label_key, x_key = jax.random.split(key, 3)
    group = jax.random.bernoulli(group_key, 0.5, (num_rows,)).astype(jnp.float32)
    y = jax.random.bernoulli(label_key, 0.5, (num_rows,)).astype(jnp.float32)
    sign = (2.0 * y - 1.0)[:, None]
    centre = sign * jnp.stack([1.0 - 0.8 * group, 0.2 + 0.8 * group], axis=1)
    return {"x": centre + 0.8 * jax.random.normal(x_key, (num_rows, 2), jnp.float32), "y": y, "group": group}


def run():
    """Crafts on one sample, measures on another: error rates `[group 0, group 1]` before and after, and infos."""
    train, goal, test = (groups(jax.random.key(k), 400) for k in (0, 1, 2))
    data = mj.dataset(train["x"], train["y"])
    assembled, known = attack(jnp.arange(160)), mj.Known(params={"w": jnp.zeros(2), "b": jnp.zeros(())}, goal=goal)
    state, infos = combine.run(assembled, jax.random.key(0), data, known, num_steps=60)

    def rates(rows):
        params, _ = bilevel.unrolled(huber, optax.sgd(0.3), 40)(jax.random.key(0), known.params, rows)
        wrong = ((model(params, test["x"]) > 0) != (test["y"] > 0)).astype(jnp.float32)
        return jnp.stack([losses.weighted_mean(wrong, 1.0 - test["group"]), losses.weighted_mean(wrong, test["group"])])

    return rates(data), rates(assembled.read(state, data)), infos


if __name__ == "__main__":
    before, after, _ = jax.jit(run)()
    print(f"error rates of the two groups: {before} before, {after} after")
