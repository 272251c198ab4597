"""Februus: a backdoored network asked again after what it looks at is cut out and painted anew.

A network is trained on CIFAR-10 with a flower of 8x8 pixels at the bottom right of a tenth of the rows, labelled 7. It has
four convolutions and no normalisation, and its last maps, 16x16, are averaged: what it says is a mean of what each place
says of 14x14 pixels around it, so GradCAM is exact and points to the part of the trigger that tells it best. (With group
norm, whose statistics are the whole image's, or with deeper stacks, it does not: the flower is never covered.) The defender
has the model and other, unlabelled clean images, on which the painter learns, and which say how hot clean images are: the
heat is in units of their 99 % quantile. A flower has to outweigh the rest of the image, and is several times hotter. The
region grows by a pixel, for the rest of a trigger is enough to fool the network. Threshold and growth were chosen on
training images kept apart, with other keys. Success and recovery (the true class is named) are over the triggered test rows
that the network got right without the trigger, and whose class isn't the target: the authors' numerator, divided by its own
denominator.

`..._published_T`: each image's heat scaled to [0, 1], threshold T, no growth. `..._autoencoder` (a painter trained without
the critic), `..._harmonic` and `..._mean` are other fills; `..._true_mask` paints the trigger's own place: what is left is
the painter's fault, the rest GradCAM's. `l1_...` is the error on random holes of test images.

References: Doan, Abbasnejad & Ranasinghe, "Februus", ACSAC 2020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks._clean_label import Images, Net, floats, images, rounded, share
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, defenses, models, threat, train
from mlsec_jax.memo import memo

TARGET = 7
PLACE = 24  # of the trigger's first pixel, in both directions
TAU, GROW = 1.0, 1
TAUS = (0.5, 0.75, TAU, 1.25, 1.5)
PUBLISHED = (0.5, 0.6, 0.7, 0.8)
PAPER = "Doan et al., ACSAC 2020, CIFAR-10 (as the lecture quotes it)"


class Size(NamedTuple):
    """What differs between the sizes."""

    width: int  # of the network
    rows: int  # that it is trained on
    epochs: int
    painter_width: int
    painter_rows: int
    painter_epochs: int
    test: int


SIZES = {
    "small": Size(8, 1000, 6, 4, 500, 2, 100),
    "full": Size(16, 38_000, 12, 16, 10_000, 14, 10_000),
    "paper": Size(16, 38_000, 30, 32, 10_000, 30, 10_000),
}


def flower(channels: int) -> threat.Trigger:
    """Six red petals around a yellow eye on green, opaque."""
    at = np.arange(8) - 3.5
    radius, angle = np.hypot(at[:, None], at), np.arctan2(at[:, None], at)
    petal = (radius < 2.6 + 1.1 * np.cos(6 * angle))[:, :, None]
    eye = (radius < 1.6)[:, :, None]
    pattern = np.where(eye, [255, 235, 0], np.where(petal, [230, 20, 60], [20, 110, 30])) / 255
    return threat.patch(jnp.asarray(pattern[:, :, :channels], jnp.float32), at=(PLACE, PLACE))


def network(width: int, mean: np.ndarray) -> models.Model:
    """The victim's."""
    return models.convnet(
        width=width, sizes=(2, 2, 4, 4), pooled=(1,), groups=None, averaged=True, mean=mean, std=np.float32(0.25)
    )


def victim(key: jax.Array, pictures: Images, size: Size) -> Net:
    """The network, trained on rows of which a tenth carry the trigger; from the cache if it is there."""
    poison_key, train_key = jax.random.split(key)
    x, y = pictures.x[: size.rows], pictures.y[: size.rows]
    rows = mj.dataset(floats(x), jnp.asarray(y, jnp.int32))
    attack = attacks.badnets(flower(x.shape[-1]), num_poisons=size.rows // 10, relabel=threat.to_class(TARGET))
    rows, _ = attack(poison_key, rows, mj.Known())
    rows = rows._replace(x=rounded(rows.x))
    mean = np.asarray(mean_pixel(rows.x))
    model = network(size.width, mean)
    recipe = train.Recipe(num_epochs=size.epochs, pad=0, flip=x.shape[-1] == 3)  # shifts would teach parts of the trigger
    fit = memo(lambda key, rows: train.pretrain(key, model, rows, recipe)[0], name="februus-victim")
    return Net(model, fit(train_key, rows))


def painter(key: jax.Array, clean: jax.Array, size: Size, *, critic: bool) -> tuple[models.Model, Any]:
    """The painter and its parameters, trained on unlabelled images; from the cache if they are there."""
    model = models.inpainter(width=size.painter_width, mean=np.asarray(mean_pixel(clean)))
    recipe = train.InpaintingRecipe(num_epochs=size.painter_epochs, batch_size=32, high=10)
    judge = models.patch_critic(width=size.painter_width) if critic else None
    learn = lambda key, rows: train.pretrain_inpainter(key, model, rows, recipe, critic=judge)[0]
    rows = mj.dataset(clean, jnp.zeros(len(clean), jnp.int32))
    return model, memo(learn, name="februus-painter")(key, rows)


def mean_pixel(x: jax.Array) -> jax.Array:
    """`[c]`."""
    return jnp.mean(x, axis=(0, 1, 2))


def settings(painters: dict, mean: jax.Array) -> dict[str, Any]:
    """Every defense that is compared, by name: `(painters' parameters, GradCAM's heat_fn by scale) -> transform`."""

    def fill_of(name: str, painted: Any) -> Any:
        if name in painters:
            return defenses.fill_network(painters[name][0].apply, painted[name])
        return defenses.fill_harmonic() if name == "harmonic" else defenses.fill_mean(mean)

    def make(fill: str, tau: float, grow: int = GROW, scale: str = "usual") -> Any:
        return lambda painted, heats: defenses.februus(heats[scale], fill_fn=fill_of(fill, painted), tau=tau, grow=grow)

    def true_mask(painted: Any, heats: Any) -> Any:
        def there(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            heat, info = heats["image"](params, x)
            return jnp.zeros_like(heat).at[:, PLACE:, PLACE:].set(1), info

        return make("network", 0.5, 0, "image")(painted, heats | {"image": there})

    found = {f"tau_{round(100 * tau)}": make("network", tau) for tau in TAUS}
    found |= {f"published_{round(100 * tau)}": make("network", tau, 0, "image") for tau in PUBLISHED}
    found |= {fill: make(fill, TAU) for fill in ("autoencoder", "harmonic", "mean")}
    return found | {"true_mask": true_mask}


def asked(net: Net, transforms: dict[str, Any]) -> Any:
    """`(params, painters' params, x, peak) -> predictions of x as it is and after each transform; what the masks were`."""
    split = defenses.split_at(net.model)

    def run(params: Any, painted: Any, x: jax.Array, peak: jax.Array) -> dict[str, jax.Array]:
        subject = mj.dataset(x, jnp.zeros(len(x), jnp.int32))
        says = lambda x: jnp.argmax(net.model.apply(params, x), axis=1)
        # Once: every transform is asked about the same images.
        seen = {"image": defenses.grad_cam(split)(params, x), "usual": defenses.grad_cam(split, peak=peak)(params, x)}
        heats = {scale: lambda params, x, of=of: of for scale, of in seen.items()}
        found = {"before": jnp.argmax(seen["usual"][1]["logits"], axis=1)}
        for name, transform in transforms.items():
            purified, info = transform(painted, heats)(jax.random.key(0), subject, mj.Known(params=params))
            found |= {name: says(purified.x), f"hidden_{name}": info["hidden"]}
            if name == f"tau_{round(100 * TAU)}":
                covered = jnp.mean(info["mask"][:, PLACE:, PLACE:].astype(jnp.float32), axis=(1, 2))
                found |= {"covered": covered, "image": purified.x, "heat": info["heat"], "mask": info["mask"]}
        return found

    def batched(params: Any, painted: Any, x: jax.Array, peak: jax.Array) -> dict[str, jax.Array]:
        parts = jax.lax.map(lambda part: run(params, painted, part, peak), x.reshape(-1, min(100, len(x)), *x.shape[1:]))
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), parts)

    return jax.jit(batched)


def errors(key: jax.Array, x: jax.Array, painters: dict, painted: Any, mean: jax.Array) -> dict[str, float]:
    """The mean L1 error of each fill on random holes."""

    def apart(key: jax.Array, x: jax.Array, painted: Any, mean: jax.Array) -> dict[str, jax.Array]:
        hole = train.random_holes(key, len(x), (x.shape[1], x.shape[2]))
        fills = {name: defenses.fill_network(painters[name][0].apply, painted[name]) for name in painters}
        fills |= {"harmonic": defenses.fill_harmonic(), "mean": defenses.fill_mean(mean)}
        size = x.shape[3] * jnp.sum(hole, axis=(1, 2, 3))
        far = lambda fill: jnp.mean(jnp.sum(hole * jnp.abs(fill(x, hole) - x), axis=(1, 2, 3)) / size)
        return {f"l1_{name}": far(fill) for name, fill in fills.items()}

    return {name: float(error) for name, error in jax.jit(apart)(key, x, painted, mean).items()}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Trains the backdoored network and the painters, and purifies clean and triggered test images."""
    pictures, chosen = images(embedded=size == "small"), SIZES[size]
    victim_key, paint_key, hole_key = jax.random.split(context.key, 3)
    net = victim(victim_key, pictures, chosen)
    clean = floats(pictures.x[-chosen.painter_rows :])
    mean = mean_pixel(clean)
    painters = {name: painter(paint_key, clean, chosen, critic=name == "network") for name in ("network", "autoencoder")}
    painted = {name: params for name, (_, params) in painters.items()}

    x, y = floats(pictures.x_test[: chosen.test]), pictures.y_test[: chosen.test]
    trigger = flower(x.shape[-1])
    transforms = settings(painters, mean)
    ask = asked(net, transforms)
    peak = jax.jit(lambda params, x: defenses.usual_peak(defenses.split_at(net.model), params, x))(net.params, clean)
    found = context.once("clean", lambda: ask(net.params, painted, x, peak))
    under = context.once("triggered", lambda: ask(net.params, painted, trigger(None, x), peak))

    counts = (found["before"] == y) & (y != TARGET)
    if not counts.any():
        raise ValueError("the network gets no row right whose class isn't the target: train it longer.")
    main = f"tau_{round(100 * TAU)}"
    figures: dict[str, Any] = {"n_test": len(y), "n_triggered": int(counts.sum())}
    for name, key in (("before", "before"), ("after", main), *((name, name) for name in transforms)):
        figures |= {f"accuracy_{name}": np.mean(found[key] == y), f"recovered_{name}": np.mean((under[key] == y)[counts])}
        figures |= share(f"success_{name}", (under[key] == TARGET)[counts])
    figures |= {
        "accuracy_lost": figures["accuracy_before"] - figures["accuracy_after"],
        "hidden_clean": found[f"hidden_{main}"].mean(),
        "hidden_triggered": under[f"hidden_{main}"][counts].mean(),
        "trigger_covered": under["covered"][counts].mean(),
        **errors(hole_key, x[:500], painters, painted, mean),
    }
    draw(context, x, found, trigger(None, x), under, np.flatnonzero(y != TARGET)[:4], figures)
    reductions = [
        *pictures.notes,
        f"four convolutions of {2 * chosen.width} and {4 * chosen.width} channels without normalisation, on {chosen.rows} rows "
        f"for {chosen.epochs} epochs (the paper's: six of 128 to 512, batch norm, two dense layers, dropout)",
        f"a painter of width {chosen.painter_width} with a critic of patches, on {chosen.painter_rows} images for "
        f"{chosen.painter_epochs} epochs (the paper's: 64, two critics)",
        "a flower drawn here (the paper's logo isn't at hand)",
        f"heat in units of clean images' (the paper's: of each image's own), and a region that grows by {GROW} pixel",
    ]
    reductions += [f"the first {chosen.test} test images"] * (chosen.test < 10_000)
    paper = {"accuracy_before": 0.9079, "success_before": 1.0, "accuracy_after": 0.9008, "success_after": 0.0025}
    return Result(figures, reductions, {name: Paper(value, PAPER) for name, value in paper.items()})


def draw(context: Any, x: Any, found: dict, stamped: Any, under: dict, rows: np.ndarray, figures: dict) -> None:
    """Strips of image, heat, mask and purified image, and the two rates over the threshold."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 2 * len(rows), figsize=(2 * len(rows), 4.4), squeeze=False)
    for k, (inputs, seen) in enumerate(((x, found), (stamped, under))):
        for column, row in zip(axes.T[k * len(rows) :], rows):
            shown = (np.asarray(inputs[row]), seen["heat"][row], seen["mask"][row], seen["image"][row])
            for axis, image in zip(column, shown):
                colours = {"cmap": "gray", "vmax": 1} if image.ndim == 3 else {"cmap": "inferno", "vmax": 2}
                axis.imshow(np.squeeze(image), vmin=0, **colours)
    for axis, name in zip(axes[:, 0], ("input", "heat", "mask", "purified")):
        axis.set_ylabel(name)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    context.save_figure(figure, "strips")

    figure, axis = plt.subplots(figsize=(4, 3))
    for name in ("accuracy", "success", "recovered"):
        axis.plot(TAUS, [figures[f"{name}_tau_{round(100 * tau)}"] for tau in TAUS], "o-", label=name)
    axis.set(xlabel="threshold τ, in units of clean images' peak", ylim=(0, 1))
    axis.legend()
    context.save_figure(figure, "thresholds")
