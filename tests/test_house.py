"""The house of docs/design.md: imports point strictly down a list, and a few words are said in one place only."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS = ["base checks tree", "linalg", "losses threat measure", "loop channels", "combine", "bilevel scores"]
LEVELS += ["train attacks defenses"]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names.split()}
ANNEX = {"models", "data", "catalogue", "parallel", "drive", "memo", "_checkpoint"}
BESIDE = {("drive", "_checkpoint"), ("memo", "_checkpoint"), ("memo", "data"), ("memo", "__version__")}
FLOOR_0 = {"base", "checks", "tree", "linalg"}
SHARED = {  # what several files of one room share; a method never imports a sibling method
    "attacks": {"_bilevel", "_craft", "_matching"},
    "catalogue": {"_method", "_attacks", "_defenses"},
    "bilevel": {"_kernels", "_unrolled", "_reversible", "_fixed_point", "_hoist", "_jaxopt"},
    "data": {"_folders"},
    "defenses": {"_invert_trigger", "_mixing"},
    "measure": {"_interval"},
    "models": {"_model", "_conv", "_conv_kernels", "_depthwise", "_pool", "_norm", "_dense"},
    "scores": {"_by_class"},
    "train": {"_augment"},
}
ONLY_IN = {"flax": "models", "haiku": "models", "equinox": "models", "jaxopt": "bilevel"}
ONLY_IN |= {"tensorflow_datasets": "data", "sklearn": "data", "mlxtend": "data", "matplotlib": "nothing"}
ONLY_IN |= {"orbax": "_checkpoint", "rich": "drive"}
SAID_NOWHERE = {"np.random", "numpy.random", "jax.config", "jax.enable_x64"}
FILES = sorted((ROOT / "mlsec_jax").rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT / "mlsec_jax").as_posix())


def imports(path):
    """Everything imported, as a list of dotted names' parts; lazy imports too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: expected absolute imports"
            yield from ([*node.module.split("."), alias.name] for alias in node.names)


def room_of(path):
    """The room of a file of the library; the package's own `__init__` has none."""
    return path.relative_to(ROOT / "mlsec_jax").with_suffix("").parts[0]


@every_file
def test_imports_point_down(path):
    room = room_of(path)
    for package, *rest in imports(path):
        if package != "mlsec_jax":
            assert ONLY_IN.get(package, room) == room, f"only {ONLY_IN[package]} imports {package}"
        elif room == "__init__":
            assert rest[0] == "base"
        elif rest[0] == room:
            shared = path.name == "__init__.py" or rest[1] in SHARED.get(room, ())
            assert shared, f"{path.stem} imports its sibling {rest[1]}: move what they share down"
        elif room in ANNEX:
            assert rest[0] in FLOOR_0 or (room, rest[0]) in BESIDE, f"{room} imports {rest[0]}"
        else:
            assert LEVEL.get(rest[0], len(LEVELS)) < LEVEL[room], f"{room} imports {rest[0]}, which isn't below it"


def test_every_module_has_its_place():
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms == set(LEVEL) | ANNEX


def test_the_package_alone_imports_a_room_when_it_is_named():
    code = """if True:
        import sys, mlsec_jax as mj
        assert [name for name in sys.modules if name.startswith("mlsec_jax.")] == ["mlsec_jax.base"]
        assert callable(mj.attacks.bilevel) and callable(mj.dataset) and mj.memo is sys.modules["mlsec_jax.memo"]
        assert not hasattr(mj, "privacy") and not hasattr(mj, "_nothing")
        from mlsec_jax import *
        print(*dir(mj))
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
    assert {room_of(path) for path in FILES} - {"__init__", "_checkpoint"} <= set(out.split())


@every_file
def test_below_the_host_nothing_prints_draws_or_switches(path):
    assert len(path.read_text().splitlines()) <= 400
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "input", "breakpoint"), f"line {node.lineno}"
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in SAID_NOWHERE, f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not all(isinstance(each, ast.Pass) for each in node.body), "it swallows"


ROOMS = sorted(path.parent.name for path in (ROOT / "mlsec_jax").glob("*/__init__.py"))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_exports_by_name_in_order(room):
    tree = ast.parse((ROOT / "mlsec_jax" / room / "__init__.py").read_text())
    names = [alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    (said,) = [ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)]
    assert said == sorted(said) and set(said) == set(names)
