"""The plots of `deep_back_gradient`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def draw(context: Any, scored: Any, aimed: Mapping[str, Any], blunt: Mapping[str, Any], rates: Mapping[str, Any]) -> None:
    """Poisons before and after, and errors at each learning rate with the spread over victims."""
    import matplotlib.pyplot as plt

    shown = [0, 10, 20, 30, 40, 45]
    figure, axes = plt.subplots(4, len(shown), figsize=(len(shown) * 1.2, 5.2))
    for row, (name, item) in enumerate((("start", aimed), ("chosen", aimed), ("start", blunt), ("chosen", blunt))):
        for axis, k in zip(axes[row], shown):
            axis.imshow(item[f"{name}_x"][k, :, :, 0], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"label {item[f'{name}_y'][k]}", fontsize=8)
            axis.set_axis_off()
    context.save_figure(figure, "poisons")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    panels = (("calm", 0, "error on 8s"), ("lively", 3, "accuracy"))
    for axis, (name, column, label) in zip(axes, panels):
        for item, values in scored[name].items():
            mean, spread = values[..., column].mean(axis=1), values[..., column].std(axis=1)
            axis.errorbar(rates[name], mean, spread, marker="o", label=item, capsize=3)
        axis.set(xscale="log", xlabel="victim's learning rate", ylabel=label, ylim=(0, 1))
        axis.legend()
    context.save_figure(figure, "learning_rates")
