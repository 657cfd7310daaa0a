"""The walls between the rooms: who may import whom."""
import ast
from pathlib import Path

import pytest

HANDLER = Path(__file__).resolve().parent.parent / "handler"
FILES = sorted(HANDLER.glob("*.py"))
FORBIDDEN = {"transformers", "torchcodec", "decord", "cv2"}


def imports_of(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports relatively; the entry file of an archive has no package"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_of(file: Path) -> set[str]:
    """The files of the package that a file imports, without `.py`."""
    stems = {other.stem for other in FILES}
    parts = [name.split(".") for name in imports_of(file)]
    return {part[1] for part in parts if part[0] == "handler" and len(part) > 1 and part[1] in stems}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_only_the_handler_knows_torchserve(file):
    knows = any(name.split(".")[0] == "ts" for name in imports_of(file))
    assert knows == (file.stem == "vivit_handler")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_needs_the_libraries_that_only_tests_and_benchmarks_use(file):
    assert not FORBIDDEN & {name.split(".")[0] for name in imports_of(file)}


def test_imports_have_no_cycle():
    waiting = {file.stem: rooms_of(file) - {"__init__"} for file in FILES if file.stem != "__init__"}
    while waiting:
        free = [room for room, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"these import each other in a circle: {waiting}"
        for room in free:
            del waiting[room]


def test_what_a_request_says_needs_neither_torch_nor_any_other_room():
    assert rooms_of(HANDLER / "api.py") == set()
    assert not {name.split(".")[0] for name in imports_of(HANDLER / "api.py")} & {"torch", "numpy", "av"}


def test_the_entry_file_defines_exactly_one_class():
    # TorchServe refuses an entry file with two, even if the second is a dataclass.
    tree = ast.parse((HANDLER / "vivit_handler.py").read_text())
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == ["VivitHandler"]
