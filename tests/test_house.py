"""The order of the floors: imports run downward, and no room reaches past its door."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parent.parent / "flatopt"
FLOORS = [
    {"_core", "schedules"},
    {"kernels"},
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


def test_imports_run_downward():
    for path in PACKAGE.rglob("*.py"):
        room = _room(path)
        if room == "__init__":
            continue
        for other in _rooms_imported(path):
            if other != room:
                assert FLOOR[other] < FLOOR[room], f"{path} imports {other}"


def test_every_room_has_a_floor():
    rooms = {_room(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR)
