"""The order of the floors: imports run downward, and no room reaches past its door."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "flatopt"
FLOORS = [
    {"_core"},
    {"kernels", "schedules"},
    {"smoothing", "curvature"},
    {"transforms", "stability"},
    {"optimizers", "sharpness", "plots", "flax"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _rooms_imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "flatopt":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("flatopt."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                assert not alias.name.startswith("flatopt"), f"{path}: {alias.name}"


@pytest.mark.heart
def test_imports_run_downward():
    for path in PACKAGE.rglob("*.py"):
        room = _room(path)
        if room == "__init__":
            continue
        for other in _rooms_imported(path):
            if other != room:
                assert FLOOR[other] < FLOOR[room], f"{path} imports {other}"


@pytest.mark.heart
def test_every_room_has_a_floor():
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR)


WHOLE_PROGRAMS = {"test_examples.py", "test_processes.py", "test_reproduce.py"}


def test_every_module_has_its_heart():
    for path in pathlib.Path(__file__).parent.rglob("test_*.py"):
        if path.name not in WHOLE_PROGRAMS | {
            "test_house.py",
            "test_peers.py",
            "test_training.py",
        }:
            assert "@pytest.mark.heart\n" in path.read_text(), path
