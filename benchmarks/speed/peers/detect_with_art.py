"""Detectors of poisons by ART 1.20.1, in its own environment: `python detect_with_art.py SPEC`.

What ART computes once it has the activations, as it comes: spectral signatures' scores of each class, or FastICA and
K-means of each class. `"reduce": "PCA"` is its default in place of FastICA. Its rule of relative size fails under NumPy 2
where a class has no suspicious cluster, so that the rule (a share below 35 %) is written out here.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
from art.defences.detector.poison.activation_defence import cluster_activations
from art.defences.detector.poison.spectral_signature_defense import SpectralSignatureDefense

from benchmarks import _served


def main() -> None:
    spec = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore", message="FastICA did not converge")
    arrays = np.load(spec["problem"])
    x, y = arrays["x"], arrays["y"]

    def detect() -> np.ndarray:
        """`[n]`: the spectral score, or 1 where a row is taken for a poison."""
        rows = [np.flatnonzero(y == label) for label in range(int(y.max()) + 1)]
        parts, out = [x[own] for own in rows], np.zeros(len(x), np.float32)
        if spec["detector"] == "spectral":
            values = [SpectralSignatureDefense.spectral_signature_scores(part)[:, 0] for part in parts]
        else:
            clusters, _ = cluster_activations(parts, 2, 10, spec["reduce"], "KMeans")
            values = [(np.bincount(own, minlength=2) / len(own) < 0.35)[own] for own in clusters]
        for own, value in zip(rows, values):
            out[own] = value
        return out

    _served.serve(detect, Path(spec["out"]))


if __name__ == "__main__":
    main()
