"""No public method escapes the laws or the catalogue."""

import importlib

from mlsec_jax import catalogue
from tests import registry


def test_every_public_name_of_the_method_rooms_is_registered():
    registered = {row.name.split("(")[0] for row in registry.ROWS}
    for room in ("attacks", "defenses", "scores", "threat"):
        public = {f"{room}.{name}" for name in importlib.import_module(f"mlsec_jax.{room}").__all__}
        missing = public - registered - registry.HELPERS
        assert not missing, f"add a row to tests/registry/ for {sorted(missing)}"
    assert registry.HELPERS.isdisjoint(registered)


def test_every_registered_method_is_in_the_catalogue_and_back():
    rooms = ("attacks.", "scores.", "defenses.")
    registered = {row.name.split("(")[0] for row in registry.ROWS if row.name.startswith(rooms)}
    assert registered == {method.name for method in catalogue.rows()}
