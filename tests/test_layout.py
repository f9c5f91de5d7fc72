"""The walls between the rooms, and what dvc.yaml says each stage depends on."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

from advmoe.core.settings import read_yaml

# a change here cannot change a result, so it should not retrain nine experts
COSMETIC = {"advmoe/console.py", "advmoe/__init__.py"}
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("[a-z]*.py"))


def module_file(name: str) -> str | None:
    """The file of a module of this project, None for others and for packages that hold a docstring only."""
    path = ROOT / name.replace(".", "/")
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if candidate.is_file():
            body = ast.parse(candidate.read_text()).body
            return str(candidate.relative_to(ROOT)) if len(body) > 1 else None
    return None


def imported(file: str) -> set[str]:
    """Files of this project that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {found for name in names if name.startswith(("advmoe", "stages")) and (found := module_file(name))}


def closure(file: str) -> set[str]:
    """The file and all it imports, directly or not."""
    seen: set[str] = set()
    todo = {file}
    while todo:
        seen |= todo
        todo = set().union(*(imported(each) for each in todo)) - seen
    return seen - COSMETIC


def declared(stage: str) -> set[str]:
    """The code that dvc.yaml lists for a stage; a folder stands for the code in it."""
    entry = read_yaml(ROOT / "dvc.yaml")["stages"][stage]
    deps = [Path(dep) for dep in entry.get("do", entry)["deps"]]
    inside = {found for dep in deps if dep.parts[0] == "advmoe" for found in _code_in(ROOT / dep)}
    return {str(dep) for dep in deps if dep.suffix == ".py"} | inside


def _code_in(folder: Path) -> set[str]:
    return {found for path in folder.glob("*.py") if (found := module_file(_dotted(path)))}


def _dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_lists_exactly_the_code_a_stage_runs(stage: str) -> None:
    assert declared(stage) == closure(f"stages/{stage}.py")


def test_every_stage_of_the_pipeline_has_its_file() -> None:
    assert sorted(read_yaml(ROOT / "dvc.yaml")["stages"]) == STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_no_stage_imports_another(stage: str) -> None:
    assert {file for file in closure(f"stages/{stage}.py") if file.startswith("stages/")} == {f"stages/{stage}.py"}


def test_only_the_command_line_imports_stages() -> None:
    for path in (ROOT / "advmoe").rglob("*.py"):
        file = str(path.relative_to(ROOT))
        if file != "advmoe/cli.py":
            assert not {found for found in imported(file) if found.startswith("stages/")}, file


ROOMS = {  # who may import whom: a room may use itself and what stands to its right
    "advmoe/models/": ("advmoe/models/",),
    "advmoe/attacks/": (
        "advmoe/attacks/",
        "advmoe/models/moe.py",  # gate-aware attacks know what a mixture is
        "advmoe/user_code.py",
        "advmoe/params.py",
        "advmoe/machine.py",
        "advmoe/errors.py",
    ),
    "advmoe/data/": (
        "advmoe/data/",
        "advmoe/params.py",
        "advmoe/machine.py",
        "advmoe/errors.py",
        "advmoe/artifacts.py",
    ),
}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_lies_below(room: str) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for found in imported(str(path.relative_to(ROOT))) - COSMETIC:
            assert found.startswith(ROOMS[room]), f"{path.name} imports {found}"


def test_training_and_evaluation_do_not_know_each_other() -> None:
    for room, other in (("training", "evaluation"), ("evaluation", "training")):
        for path in (ROOT / "advmoe" / room).rglob("*.py"):
            assert not any(f"advmoe/{other}/" in found for found in imported(str(path.relative_to(ROOT)))), path
