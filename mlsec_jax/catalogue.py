"""The map of the field as data: one row a method, saying what its actor wants, sees, may touch, and when.

    >>> [row.budget for row in find(name="attacks.flip_random")]
    ['number of rows']

Adding a method is one call of `_row` below. Documentation tables, `find` and tests are made from the rows; a word
outside the closed lists fails at import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal, get_args

Goal = Literal["integrity", "availability", "privacy"]
Capability = Literal["training data", "test data", "queries", "model"]
Knowledge = Literal["white", "gray", "black"]
Trigger = Literal["none", "visible", "hidden"]
Stage = Literal["before training", "during training", "after training", "at test"]


@dataclasses.dataclass(frozen=True)
class Method:
    """One method's threat model.

    Attributes:
      name: where it lives, `"attacks.bilevel"`.
      title: what people call it.
      goal: what is attacked, or defended: one or several of integrity, availability, privacy.
      capability: what the actor holds in its hands.
      knowledge: what it knows of the victim: everything (white), the kind of model and data like its (gray), nothing.
      train_trigger: whether a trigger is in the training data, and can be seen there.
      test_trigger: the same of the test inputs.
      stage: when it acts, seen from the victim's training.
      changes: what it changes, in words.
      budget: what bounds the change, in words.
      reference: authors, venue, year.
    """

    name: str
    title: str
    goal: tuple[Goal, ...]
    capability: Capability
    knowledge: Knowledge
    train_trigger: Trigger
    test_trigger: Trigger
    stage: Stage
    changes: str
    budget: str
    reference: str

    def __post_init__(self) -> None:
        """Refuses words outside the closed lists, and empty ones."""
        lists = {
            "capability": Capability,
            "knowledge": Knowledge,
            "train_trigger": Trigger,
            "test_trigger": Trigger,
            "stage": Stage,
        }
        for field, words in lists.items():
            _one_of(self.name, field, getattr(self, field), words)
        if not isinstance(self.goal, tuple) or not self.goal:
            raise ValueError(f"{self.name}: expected goal to be a tuple of words, got {self.goal!r}.")
        for goal in self.goal:
            _one_of(self.name, "goal", goal, Goal)
        for field in ("name", "title", "changes", "budget", "reference"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{self.name}: expected {field} to be a sentence, got {getattr(self, field)!r}.")


def _one_of(name: str, field: str, value: Any, words: Any) -> None:
    """Raises unless the value is a word of the list."""
    if value not in get_args(words):
        raise ValueError(f"{name}: expected {field} to be one of {', '.join(get_args(words))}, got {value!r}.")


_rows: dict[str, Method] = {}


def _row(name: str, **fields: Any) -> None:
    """Adds a row. Most attacks here poison training data, knowing the victim, without a trigger: those are defaults."""
    usual = {"capability": "training data", "knowledge": "white", "train_trigger": "none", "test_trigger": "none"}
    if name in _rows:
        raise ValueError(f"{name}: expected one row a method, got two.")
    _rows[name] = Method(name=name, **{**usual, "stage": "before training", **fields})


def rows() -> tuple[Method, ...]:
    """All rows, in the order of this file."""
    return tuple(_rows.values())


def find(**filters: Any) -> tuple[Method, ...]:
    """The rows whose fields have the given values; `goal` matches any of a row's goals.

    >>> [row.title for row in find(name="attacks.metapoison")]
    ['MetaPoison']
    """
    known = {field.name for field in dataclasses.fields(Method)}
    unknown = sorted(set(filters) - known)
    if unknown:
        raise ValueError(f"filters: expected fields of a row ({', '.join(sorted(known))}), got {unknown}.")
    for field, words in (("goal", Goal), ("capability", Capability), ("knowledge", Knowledge), ("stage", Stage)):
        if field in filters:
            _one_of("filters", field, filters[field], words)
    for field in {"train_trigger", "test_trigger"} & set(filters):
        _one_of("filters", field, filters[field], Trigger)

    def matches(row: Method) -> bool:
        return all(
            value in row.goal if field == "goal" else getattr(row, field) == value for field, value in filters.items()
        )

    return tuple(row for row in rows() if matches(row))


def markdown(chosen: Iterable[Method] | None = None) -> str:
    """The rows as a Markdown table, for the documentation; all of them unless some are given."""
    head = ("method", "goal", "holds", "knows", "trigger (training / test)", "when", "changes", "budget", "reference")
    lines = [head, ("---",) * len(head)]
    for row in rows() if chosen is None else chosen:
        trigger = f"{row.train_trigger} / {row.test_trigger}"
        what = f"{row.title} (`{row.name}`)"
        which = (", ".join(row.goal), row.capability, row.knowledge, trigger, row.stage)
        lines.append((what, *which, row.changes, row.budget, row.reference))
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join(f"| {' | '.join(line)} |\n" for line in escaped)


_row(
    "attacks.bilevel",
    title="Bilevel poisoning, any objective",
    goal=("integrity", "availability"),
    changes="what its Threat embeds: rows, pixels, labels or weights",
    budget="its Threat's",
    reference="Mei & Zhu, AAAI 2015; Biggio, Nelson & Laskov, ICML 2012",
)
_row(
    "attacks.availability",
    title="Error-generic poisoning (denial of service)",
    goal=("availability",),
    changes="features of added rows",
    budget="number of rows; box",
    reference="Muñoz-González et al., AISec 2017",
)
_row(
    "attacks.targeted",
    title="Targeted poisoning",
    goal=("integrity",),
    changes="features of added rows",
    budget="number of rows; box",
    reference="Muñoz-González et al., AISec 2017; Koh & Liang, ICML 2017",
)
_row(
    "attacks.error_specific",
    title="Error-specific poisoning (one class as another)",
    goal=("integrity",),
    changes="features of added rows, which start with swapped labels",
    budget="number of rows; box",
    reference="Muñoz-González et al., AISec 2017, eq. (4)",
)
_row(
    "attacks.svm_kkt",
    title="SVM poisoning through the KKT conditions",
    goal=("availability",),
    changes="features of added rows with flipped labels",
    budget="number of rows; box",
    reference="Biggio, Nelson & Laskov, ICML 2012",
)
_row(
    "attacks.linear_regression",
    title="Poisoning LASSO, ridge and the elastic net",
    goal=("availability", "integrity"),
    changes="features of added rows",
    budget="number of rows; box",
    reference="Xiao et al., ICML 2015",
)
_row(
    "attacks.influence_images",
    title="Adversarial training images by influence functions",
    goal=("integrity",),
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Koh & Liang, ICML 2017",
)
_row(
    "attacks.kkt_sanitized",
    title="KKT attack on sanitized linear classifiers",
    goal=("availability",),
    changes="features and labels of added rows (copies of two points)",
    budget="fraction of rows; the defender's feasible set",
    reference="Koh, Steinhardt & Liang, Machine Learning 111, 2022",
)
_row(
    "attacks.metapoison",
    title="MetaPoison",
    goal=("integrity",),
    knowledge="gray",
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Huang et al., NeurIPS 2020",
)
_row(
    "attacks.feature_collision",
    title="Feature collision (Poison Frogs)",
    goal=("integrity",),
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; distance to the base, or l-inf radius",
    reference="Shafahi et al., NeurIPS 2018",
)
_row(
    "attacks.convex_polytope",
    title="Convex Polytope",
    goal=("integrity",),
    knowledge="gray",
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Zhu et al., ICML 2019",
)
_row(
    "attacks.bullseye_polytope",
    title="Bullseye Polytope",
    goal=("integrity",),
    knowledge="gray",
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Aghakhani et al., EuroS&P 2021",
)
_row(
    "attacks.gradient_matching",
    title="Gradient matching (Witches' Brew)",
    goal=("integrity",),
    knowledge="gray",
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Geiping et al., ICLR 2021",
)
_row(
    "attacks.sleeper_agent",
    title="Sleeper Agent",
    goal=("integrity",),
    knowledge="gray",
    train_trigger="hidden",
    test_trigger="visible",
    changes="pixels of chosen training rows; labels stay",
    budget="number of rows; l-inf radius",
    reference="Souri et al., NeurIPS 2022",
)
_row(
    "attacks.flip_random",
    title="Random label flips",
    goal=("availability",),
    knowledge="black",
    changes="labels",
    budget="number of rows",
    reference="baseline; Biggio, Nelson & Laskov, ACML 2011",
)
_row(
    "attacks.flip_margin",
    title="Label flips ranked by margin",
    goal=("availability",),
    changes="labels",
    budget="number of rows",
    reference="baseline; Xiao, Xiao & Eckert, ECAI 2012 (nearest and farthest first)",
)
_row(
    "attacks.flip_greedy",
    title="Greedy label flips",
    goal=("availability",),
    changes="labels",
    budget="number of rows",
    reference="Paudice, Muñoz-González & Lupu, 2018",
)
_row(
    "attacks.flip_alfa",
    title="ALFA: adversarial label flips",
    goal=("availability",),
    changes="labels",
    budget="number of rows",
    reference="Xiao, Xiao & Eckert, ECAI 2012",
)
_row(
    "attacks.badnets",
    title="BadNets",
    goal=("integrity",),
    knowledge="black",
    train_trigger="visible",
    test_trigger="visible",
    changes="a trigger on chosen rows, and their labels",
    budget="number of rows; the trigger",
    reference="Gu, Dolan-Gavitt & Garg, arXiv:1708.06733, 2017",
)

# Defenses: who defends holds the training data, the model or the inputs; the goal is what is defended.

_row(
    "scores.influence",
    title="Influence functions",
    goal=("integrity", "availability"),
    changes="removes rows that raise a held-out loss",
    budget="share removed; clean holdout",
    reference="Koh & Liang, ICML 2017",
)
_row(
    "scores.sphere",
    title="Sphere defense",
    goal=("integrity", "availability"),
    changes="removes rows far from their class centroid",
    budget="share removed",
    reference="Steinhardt, Koh & Liang, NeurIPS 2017",
)
_row(
    "scores.slab",
    title="Slab defense",
    goal=("integrity", "availability"),
    changes="removes rows far from their class centroid, along the line between centroids",
    budget="share removed",
    reference="Steinhardt, Koh & Liang, NeurIPS 2017",
)
_row(
    "scores.spectral",
    title="Spectral signatures",
    goal=("integrity",),
    train_trigger="visible",
    test_trigger="visible",
    changes="removes rows far out on their class's first principal direction",
    budget="1.5 ε of each class removed",
    reference="Tran, Li & Madry, NeurIPS 2018",
)
_row(
    "defenses.clip_weights",
    title="Weight clipping",
    goal=("integrity",),
    capability="model",
    stage="after training",
    changes="parameters outside a box",
    budget="the box",
    reference="baseline",
)
_row(
    "defenses.noise_weights",
    title="Weight noise",
    goal=("integrity",),
    capability="model",
    stage="after training",
    changes="all parameters, at random",
    budget="scale of the noise",
    reference="baseline",
)
_row(
    "scores.activation_clusters",
    title="Activation clustering",
    goal=("integrity",),
    train_trigger="visible",
    test_trigger="visible",
    changes="removes the smaller of two clusters of each class's independent components",
    budget="threshold on a cluster's share, its silhouette or its reclassification",
    reference="Chen et al., SafeAI at AAAI 2019",
)
_row(
    "scores.deep_knn",
    title="Deep k-NN",
    goal=("integrity",),
    changes="removes rows whose neighbours in feature space have another label",
    budget="number of neighbours",
    reference="Peri et al., ECCV Workshops 2020",
)
_row(
    "scores.strip",
    title="STRIP",
    goal=("integrity",),
    capability="test data",
    stage="at test",
    train_trigger="visible",
    test_trigger="visible",
    changes="rejects inputs whose predictions survive clean images laid over them",
    budget="rate of false alarms; clean rows",
    reference="Gao et al., ACSAC 2019",
)
_row(
    "scores.roni",
    title="Reject on negative impact",
    goal=("availability",),
    changes="removes rows that lower the accuracy on a quiz",
    budget="number of trials; clean rows",
    reference="Nelson et al., LEET 2008; Barreno et al., MLJ 2010",
)
_row(
    "scores.low_loss",
    title="Loss-based isolation (ABL)",
    goal=("integrity",),
    train_trigger="visible",
    test_trigger="visible",
    changes="removes the rows that are learned first",
    budget="share removed",
    reference="Li et al., NeurIPS 2021",
)
