"""Fingerprints of code: only a change of meaning changes one, and only for the stages that can run what was changed."""

import shutil
from pathlib import Path

import pytest
from conftest import ROOT

from advmoe.runtime import code_fingerprint
from advmoe.runtime.code_fingerprint import import_closure, stage_fingerprint, stage_names

STAGES = set(stage_names(ROOT / "stages")) - {"code"}
THREATS = {"extract", "membership", "poison"}  # train victims, shadows and surrogates


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code that tests may edit; each undoes what it did."""
    root = tmp_path_factory.mktemp("code")
    for folder in ("advmoe", "stages"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def fingerprints(root: Path) -> dict[str, str]:
    return {stage: stage_fingerprint(stage, root / "stages", root / "advmoe") for stage in STAGES}


def changed(root: Path, file: str, old: str, new: str) -> set[str]:
    """The stages whose fingerprint changes with an edit."""
    path = root / file
    text = path.read_text()
    assert text.count(old) >= 1
    before = fingerprints(root)
    path.write_text(text.replace(old, new, 1))
    try:
        after = fingerprints(root)
    finally:
        path.write_text(text)
    return {stage for stage in STAGES if before[stage] != after[stage]}


def test_the_copy_has_the_fingerprints_of_the_original(copy: Path) -> None:
    assert fingerprints(copy) == fingerprints(ROOT)


def test_docstrings_comments_and_formatting_do_not_count(copy: Path) -> None:
    file = "advmoe/training/trades.py"
    assert changed(copy, file, '"""', '"""More words. ') == set()
    assert changed(copy, file, "\n\n\ndef ", "\n\n# a comment\n\n\ndef ") == set()
    assert changed(copy, file, "\n\n\ndef ", "\n\n\n\n\ndef ") == set()


def test_code_counts_for_the_stages_that_import_it(copy: Path) -> None:
    training = {"pretrain", "train", "baseline"}
    assert changed(copy, "advmoe/training/trades.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == training | THREATS
    assert changed(copy, "advmoe/threats/poisoning/badnets.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == {"poison"}
    assert changed(copy, "advmoe/threats/extraction/victims.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == {"extract"}
    assert changed(copy, "stages/prepare.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == {"prepare"}


def test_imports_inside_functions_count(copy: Path) -> None:
    closure = import_closure(copy / "stages/prepare.py", copy / "advmoe")
    assert copy / "advmoe/data/sources/downloads.py" in closure


def test_the_command_line_and_the_console_do_not_count(copy: Path) -> None:
    assert changed(copy, "advmoe/core/console.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == set()
    assert changed(copy, "advmoe/cli/application.py", "\n\n\ndef ", "\n\n\nNEW = 1\n\n\ndef ") == set()


def test_templates_count_for_the_report(copy: Path) -> None:
    assert changed(copy, "advmoe/reporting/report/templates/style.css", "{", "{ ") == {"report"}


def test_a_number_in_code_counts(copy: Path) -> None:
    path = copy / "stages/new.py"
    path.write_text('"""new: a stage for this test."""\n\nNUMBER = 1\n')
    first = stage_fingerprint("new", copy / "stages", copy / "advmoe")
    path.write_text('"""new: other words."""\n\nNUMBER = 2\n')
    assert stage_fingerprint("new", copy / "stages", copy / "advmoe") != first
    path.write_text('"""new: once more."""\n\n\n\nNUMBER = (\n    1\n)  # one\n')
    assert stage_fingerprint("new", copy / "stages", copy / "advmoe") == first
    path.unlink()


def test_checkpoints_of_a_stage_are_keyed_by_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    try:
        code_fingerprint.set_stage("train")
        assert code_fingerprint.code_fingerprint() == stage_fingerprint("train")
        code_fingerprint.set_stage(None)
        assert (
            code_fingerprint.code_fingerprint() == code_fingerprint.package_fingerprint() != stage_fingerprint("train")
        )
    finally:
        code_fingerprint.set_stage(None)
