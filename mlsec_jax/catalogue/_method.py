"""What a row of the catalogue is."""

from __future__ import annotations

import dataclasses
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
            one_of(self.name, field, getattr(self, field), words)
        if not isinstance(self.goal, tuple) or not self.goal:
            raise ValueError(f"{self.name}: expected goal to be a tuple of words, got {self.goal!r}.")
        for goal in self.goal:
            one_of(self.name, "goal", goal, Goal)
        for field in ("name", "title", "changes", "budget", "reference"):
            if not isinstance(getattr(self, field), str) or not getattr(self, field):
                raise ValueError(f"{self.name}: expected {field} to be a sentence, got {getattr(self, field)!r}.")


def one_of(name: str, field: str, value: Any, words: Any) -> None:
    """Raises unless the value is a word of the list."""
    if value not in get_args(words):
        raise ValueError(f"{name}: expected {field} to be one of {', '.join(get_args(words))}, got {value!r}.")


def row(name: str, **fields: Any) -> Method:
    """A row. Most attacks here poison training data, knowing the victim, without a trigger: those are defaults."""
    usual = {"capability": "training data", "knowledge": "white", "train_trigger": "none", "test_trigger": "none"}
    return Method(name=name, **{**usual, "stage": "before training", **fields})
