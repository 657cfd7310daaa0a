"""Rules for imports: between sub-packages, and of other libraries."""

import ast
from functools import cache
from pathlib import Path

import pytest

HANDLER = Path(__file__).resolve().parents[2] / "handler"
FILES = sorted(HANDLER.rglob("*.py"))
SERVING_FILES = [file for file in FILES if "cli" not in file.relative_to(HANDLER).parts]
TORCHSERVE_FILES = ("vivit_handler", "torchserve_compat")
FORBIDDEN = {"transformers", "torchcodec", "decord", "cv2", "jax"}


@cache
def imports_of(file: Path) -> set[str]:
    """Dotted names of everything that a file imports, at any level."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import; the archive's entry file has no package"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(file: Path) -> str:
    """`handler.video.index` for handler/video/index.py, `handler.video` for its __init__.py."""
    parts = file.relative_to(HANDLER.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in FILES}


def unit_of(module: str) -> str:
    """The sub-package or top-level module that a module belongs to: `video` for `handler.video.index`."""
    return module.split(".")[1] if "." in module else ""


def units_used_by(unit: str) -> set[str]:
    modules = [module for module in MODULES if unit_of(module) == unit]
    used = {name for module in modules for name in imports_of(MODULES[module]) if name.startswith("handler.")}
    return {unit_of(name) for name in used if name in MODULES} - {unit, ""}


def assert_no_cycle(dependencies: dict[str, set[str]]) -> None:
    waiting = dict(dependencies)
    while waiting:
        free = [name for name, needs in waiting.items() if not needs & waiting.keys()]
        assert free, f"circular imports: {waiting}"
        for name in free:
            del waiting[name]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_torchserve_imported_only_by_its_modules(file):
    if any(name.split(".")[0] == "ts" for name in imports_of(file)):
        assert file.stem in TORCHSERVE_FILES


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_test_and_benchmark_libraries_not_imported(file):
    assert not FORBIDDEN & {name.split(".")[0] for name in imports_of(file)}


def test_sub_packages_have_no_circular_imports():
    units = {unit_of(module) for module in MODULES} - {""}
    assert_no_cycle({unit: units_used_by(unit) for unit in units})


def test_modules_have_no_circular_imports():
    assert_no_cycle(
        {
            module: {name for name in imports_of(file) if name in MODULES and name != module and "." in name}
            for module, file in MODULES.items()
        }
    )


@pytest.mark.parametrize("file", SERVING_FILES, ids=module_of)
def test_serving_code_does_not_import_command_line_or_training(file):
    forbidden = {"cli", "training"} - {unit_of(module_of(file))}
    assert not {name for name in imports_of(file) if unit_of(name) in forbidden}


@pytest.mark.parametrize("unit", ["protocol", "video", "sandbox", "threads", "validation", "views"])
def test_decoder_processes_and_protocol_load_no_torch(unit):
    files = [file for module, file in MODULES.items() if unit_of(module) == unit]
    assert not any(name.split(".")[0] == "torch" for file in files for name in imports_of(file))


def test_protocol_uses_only_validation_and_views():
    assert units_used_by("protocol") <= {"validation", "views"}


def test_models_do_not_use_kernels():
    assert "kernels" not in units_used_by("models")


def test_entry_file_defines_exactly_one_class():
    # TorchServe rejects an entry file with two, even if the second is a dataclass.
    tree = ast.parse((HANDLER / "vivit_handler.py").read_text())
    assert [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] == ["VivitHandler"]
