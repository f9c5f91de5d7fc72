"""The rooms of the code: who may import whom, no circles, and what every folder says of itself."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

from advmoe.core.settings import read_yaml
from advmoe.runtime.code_fingerprint import import_closure, stage_names

PACKAGE = ROOT / "advmoe"
# from the bottom up: a room imports from itself and from rooms before it
ROOMS = (
    *("core", "runtime", "data", "statistics", "models", "attacks", "training", "evaluation", "threats", "reporting"),
    *("config", "cli"),
)
NEIGHBOURS = {("evaluation", "training"), ("training", "evaluation")}  # neither knows the other
MOST_ENTRIES = 15
STAGES = stage_names(ROOT / "stages")


def modules() -> dict[str, Path]:
    """Every module of the package and of the stages, by dotted name."""
    files = [path for folder in ("advmoe", "stages") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


MODULES = modules()


def imported(module: str) -> set[str]:
    """The modules of this project that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return {name for name in names if name in MODULES and name not in {"advmoe", module}}


def room_of(module: str) -> str:
    """The folder of the package that a module is in; empty for the package's own `__init__` and `__main__`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "advmoe" and len(parts) > 1 and parts[1] in ROOMS else ""


def test_the_package_has_few_entries() -> None:
    entries = [path for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= MOST_ENTRIES
    assert {path.name for path in entries if path.is_dir()} == set(ROOMS)


@pytest.mark.parametrize("module", [name for name in MODULES if room_of(name)])
def test_imports_point_one_way(module: str) -> None:
    for other in imported(module):
        assert not other.startswith("stages") or room_of(module) == "cli", f"{module} imports {other}"
        if room_of(other):
            assert ROOMS.index(room_of(other)) <= ROOMS.index(room_of(module)), f"{module} imports {other}"
            assert (room_of(module), room_of(other)) not in NEIGHBOURS, f"{module} imports {other}"


def test_there_is_no_circle_of_imports() -> None:
    try:
        TopologicalSorter({module: imported(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"circle of imports: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    closure = import_closure(ROOT / "stages" / f"{stage}.py", PACKAGE)
    assert [path.name for path in closure if path.parent == ROOT / "stages"] == [f"{stage}.py"]
    assert not [path for path in closure if path.is_relative_to(PACKAGE / "cli")]


def test_every_stage_of_the_pipeline_has_its_file() -> None:
    assert sorted(read_yaml(ROOT / "dvc.yaml")["stages"]) == STAGES


FOLDERS = sorted({path.parent for path in MODULES.values() if path.is_relative_to(PACKAGE)})


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.relative_to(ROOT).as_posix())
def test_every_folder_says_what_it_is_for(folder: Path) -> None:
    said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert said is not None
    assert len(said.split()) >= 15, "what lives here, what does not, and how to add one more"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_tests_stand_in_the_folders_of_what_they_test(path: Path) -> None:
    folder = path.parent.relative_to(ROOT / "tests")
    mirrored = [PACKAGE / folder, ROOT / folder]
    assert any(each.is_dir() for each in mirrored)


def test_the_pipeline_is_short_enough_to_read() -> None:
    assert len((ROOT / "dvc.yaml").read_text().splitlines()) <= 260
    assert len((ROOT / "dvc.lock").read_text().splitlines()) <= 1600
    assert ".py" not in (ROOT / "dvc.yaml").read_text()
