"""Runs secml's poisoning attack in secml's own environment: `IN.npz OUT.npz SETTINGS` (Python 3.8)."""

import json
import resource
import sys
import time

import numpy as np
from secml.adv.attacks import CAttackPoisoningLogisticRegression
from secml.array import CArray
from secml.data import CDataset
from secml.ml.classifiers import CClassifierLogistic


def cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Recorded(CAttackPoisoningLogisticRegression):
    """The attack as it is; after each point the poisons so far and the time are written."""

    def save(self, finished):
        seconds, cpu_seconds, poisons = zip(*self.history)
        np.savez(self.target, seconds=seconds, cpu_seconds=cpu_seconds, poisons=poisons, finished=finished)

    def _run(self, xc, yc, idx=0):
        if not self.history:
            self.history.append((0.0, 0.0, xc.tondarray().copy()))
            self.began = time.perf_counter(), cpu()
        best = super()._run(xc, yc, idx)
        now = xc.tondarray().copy()
        now[idx] = best.tondarray()
        self.history.append((time.perf_counter() - self.began[0], cpu() - self.began[1], now))
        self.save(False)
        return best


def main(source, target, settings):
    data, settings = np.load(source), json.loads(settings)
    train, val = (CDataset(data["x_" + name], data["y_" + name]) for name in ("train", "val"))
    victim = CClassifierLogistic(C=float(data["C"]))
    victim.fit(train.X, train.Y)
    attack = Recorded(
        victim, training_data=train, val=val, lb=0.0, ub=1.0, distance=settings["distance"], random_seed=0,
        solver_type="pgd-ls", solver_params=settings["solver"],
    )
    attack.history, attack.target = [], target
    attack.n_points = len(data["y_start"])
    start = CDataset(CArray(data["x_start"]), CArray(data["y_start"]))
    attack.run(val.X, val.Y, ds_init=start, max_iter=settings["passes"])
    if not np.array_equal(attack.yc.tondarray(), data["y_start"]):
        raise ValueError("y_start: expected secml to keep the labels it was given.")
    attack.save(True)


if __name__ == "__main__":
    main(*sys.argv[1:])
