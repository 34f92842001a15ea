"""Imports point downstairs only, the paper wing needs no torch, and no file outgrows a reader."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2] / "manyscale"
FLOORS = [  # lowest first; rooms on one floor do not import each other
    {"config", "storage"},
    {"presets", "ops", "ranks"},
    {"plan", "layers", "data"},
    {"recipes", "models"},
    {"heads"},
    {"tasks"},
    {"train"},
    {"ship", "studies"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted(HOUSE.rglob("*.py"))
GROUND = HOUSE / "__init__.py"  # belongs to no floor: names are loaded when first used


def imported(tree: ast.AST, package: tuple[str, ...]) -> set[str]:
    """Dotted names of everything a file of `package` imports, at module level or inside a function, or has through `manyscale.`"""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name + (".another name" if alias.asname and alias.name == "manyscale" else "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "manyscale":
            names.add(f"manyscale.{node.attr}")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                names.add(first.value)
    return names


def rooms_used(text: str, package: tuple[str, ...]) -> set[str]:
    """Rooms of the house a source imports; the version alone may be had from the front door."""
    names = (name.split(".") for name in imported(ast.parse(text), package))
    return {name[1] for name in names if name[0] == "manyscale" and len(name) > 1} - {"__version__"}


def upstairs(text: str, file: Path) -> set[str]:
    """What a source imports and must not."""
    parts = file.relative_to(HOUSE.parent).with_suffix("").parts
    room = parts[1]
    return {used for used in rooms_used(text, parts[:-1]) if used != room and FLOOR.get(used, len(FLOORS)) >= FLOOR[room]}


def test_every_room_has_a_floor():
    rooms = {file.relative_to(HOUSE).with_suffix("").parts[0] for file in SOURCES} - {"__init__"}
    assert rooms <= FLOOR.keys(), f"give {rooms - FLOOR.keys()} a floor in FLOORS, and in ARCHITECTURE.md"


@pytest.mark.parametrize("file", [f for f in SOURCES if f != GROUND], ids=lambda f: str(f.relative_to(HOUSE)))
def test_imports_point_downstairs(file):
    assert not upstairs(file.read_text(), file)


def test_the_front_door_imports_nothing():
    body = ast.parse(GROUND.read_text()).body
    module_level = ast.Module([node for node in body if not isinstance(node, ast.FunctionDef)], [])
    assert not [name for name in imported(module_level, ("manyscale",)) if name.startswith("manyscale")]


@pytest.mark.parametrize(
    ("text", "file", "found"),
    [
        ("import manyscale.models.swin", "plan/count.py", {"models"}),
        ("from manyscale import layers", "plan/count.py", {"layers"}),
        ("def f():\n    from manyscale.cli import main", "ops/windows.py", {"cli"}),
        ("from ..train import loop", "data/loader.py", {"train"}),
        ("from .. import tasks", "heads/linear.py", {"tasks"}),
        ("import importlib\nimportlib.import_module('manyscale.ship.hub')", "train/loop.py", {"ship"}),
        ("import manyscale\nmanyscale.create_model('x')", "train/loop.py", {"create_model"}),
        ("import manyscale as ms", "train/loop.py", {"another name"}),
        ("import manyscale\nmanyscale.__version__", "train/loop.py", set()),
        ("from manyscale import create_model", "train/loop.py", {"create_model"}),
        ("from manyscale.nowhere import x", "cli.py", {"nowhere"}),
        ("from . import masks\nfrom manyscale.data.masks import m\nfrom manyscale import __version__", "data/loader.py", set()),
        ("from manyscale.config import SwinConfig\nimport torch", "ops/windows.py", set()),
    ],
)
def test_the_rule_itself(text, file, found):
    assert upstairs(text, HOUSE / file) == found


@pytest.mark.parametrize("module", ["manyscale", "manyscale.presets", "manyscale.plan.budget", "manyscale.recipes", "manyscale.cli"])
def test_no_torch(module):
    code = f"import {module}, sys; print(*sorted({{'torch', 'torchvision', 'timm', 'transformers'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_no_utils():
    folders = (HOUSE, HOUSE.parent / "tests", HOUSE.parent / "docs")
    assert not [file for folder in folders for file in folder.rglob("utils.py")]


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(HOUSE)))
def test_files_stay_short(file):
    assert len(file.read_text().splitlines()) <= 420
