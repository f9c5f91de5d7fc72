"""The command line: every command does its work, every mistake is one sentence and exit code 2."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, Advmoe, Ran, sentence
from PIL import Image

from advmoe import cli
from advmoe.attacks import presets
from advmoe.config import validation
from advmoe.core import artifacts, files, paths
from advmoe.core.errors import UserError
from advmoe.core.settings import read_yaml
from advmoe.data import dataset
from advmoe.evaluation import verdict
from advmoe.models import classifiers, inference
from advmoe.runtime import machine
from advmoe.statistics.intervals import Proportion
from advmoe.threats import victim_training

COMMANDS = (
    "code",
    "inputs",
    "experts",
    "prepare",
    "pretrain",
    "train",
    "baseline",
    "evaluate",
    "poison",
    "extract",
    "membership",
    "report",
    "attacks",
    "results",
    "aggregate",
    "findings",
    "export",
    "use",
    "check",
    "clean",
    "cost",
    "inspect",
    "predict",
    "info",
)
STAGE_COMMANDS = [
    ["prepare"],
    ["pretrain", "clean"],
    ["train"],
    ["baseline", "standard"],
    ["inputs"],
    ["experts"],
    ["evaluate", "--record"],
    ["poison", "badnets"],
    ["poison", "badnets", "--record"],
    ["extract", "knockoff"],
    ["extract", "knockoff", "--record"],
    ["membership"],
    ["membership", "--record"],
    ["report"],
]

Edit = Callable[[dict[str, Any]], None]


def in_a_process(*arguments: str, cwd: Path) -> Ran:
    """`python -m advmoe ...` as DVC calls it."""
    environment = os.environ | {"ADVMOE_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "advmoe", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)
    return Ran(done.returncode, done.stdout, done.stderr)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its content."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def flat(text: str) -> str:
    """Text of a table without its frame and its line breaks."""
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())


# ---- help ------------------------------------------------------------------------------------------------------------


def test_help_is_quick_and_lists_all_commands(tmp_path: Path) -> None:
    """In a fresh interpreter, because this one has imported everything already."""
    program = (
        "import atexit, sys\n"
        "slow = {'torch', 'torchvision', 'sklearn', 'scipy'}\n"
        "atexit.register(lambda: print('slow:', sorted(slow & set(sys.modules))))\n"
        "from advmoe.cli import main\n"
        "sys.argv = ['advmoe', '--help']\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "slow: []" in done.stdout
    assert [name for name in COMMANDS if not re.search(rf"^\W+{name}\s", done.stdout, re.MULTILINE)] == []


def test_the_list_of_commands_is_complete() -> None:
    assert {
        command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback
    } == (set(COMMANDS))


def test_every_stage_of_the_pipeline_is_a_command() -> None:
    assert set(read_yaml(ROOT / "dvc.yaml")["stages"]) <= set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(advmoe: Advmoe, command: str) -> None:
    ran = advmoe(command, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert command in ran.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretend"],
        ["evaluate", "--steps", "0"],
        ["evaluate", "--limit", "few"],
        ["poison"],
        ["poison", "badnets", "--rate", "much"],
        ["poison", "badnets", "--target", "-1"],
        ["poison", "badnets", "--seed", "-1"],
        ["pretrain"],
        ["predict"],
        ["info", "-x"],
    ],
)
def test_a_wrong_call_explains_itself(advmoe: Advmoe, inputs_only: Path, arguments: list[str]) -> None:
    before = tree(inputs_only)
    ran = advmoe(*arguments)
    assert ran.code == 2
    assert "Usage:" in ran.err
    assert "Traceback" not in ran.err
    assert tree(inputs_only) == before


# ---- params.yaml and the environment stop everything -----------------------------------------------------------------


@pytest.mark.parametrize("command", STAGE_COMMANDS, ids=" ".join)
def test_a_typo_in_params_stops_every_stage(advmoe: Advmoe, project: Path, command: list[str]) -> None:
    """A typo in another section too: `dvc exp run -S +typo=1` is accepted silently by DVC."""
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("\nevaluate:", "\ntypo: 1\n\nevaluate:"))
    before = tree(project)
    assert sentence(advmoe(*command)) == "params.yaml: typo: is not a known key"
    assert tree(project) == before


def test_a_typo_stops_a_stage_in_its_own_process(project: Path) -> None:
    params = project / "params.yaml"
    params.write_text(params.read_text().replace("batch_size:", "batchsize:", 1))
    before = tree(project)
    ran = in_a_process("prepare", cwd=project)
    assert sentence(ran).startswith("params.yaml: pretrain.batchsize: is not a known key")
    assert ran.out == ""
    assert tree(project) == before


def test_a_stage_outside_of_a_project_says_where_to_go(
    advmoe: Advmoe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence(advmoe("prepare")) == "params.yaml: no such file; run advmoe from the root of the project"


@pytest.mark.parametrize("command", [["prepare"], ["info"], ["check"], ["evaluate", "--attack", "fgsm"]], ids=" ".join)
def test_an_unknown_variable_stops_what_computes(
    advmoe: Advmoe, project: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    del project
    monkeypatch.setenv("ADVMOE_EPSILON", "0.3")  # would change a number behind DVC's back
    assert sentence(advmoe(*command)).startswith("environment: ADVMOE_EPSILON is not known; known are ADVMOE_CACHE_DIR")


@pytest.mark.parametrize("command", STAGE_COMMANDS, ids=" ".join)
def test_a_stage_in_several_processes_is_refused(
    advmoe: Advmoe, project: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = tree(project)
    assert sentence(advmoe(*command)).startswith("environment: started as 2 processes")
    assert tree(project) == before


# ---- stages ----------------------------------------------------------------------------------------------------------


def test_prepare_gives_the_same_bytes_again(advmoe: Advmoe, project: Path) -> None:
    before = paths.DATASET.read_bytes()
    shutil.rmtree(project / "artifacts")
    ran = advmoe("prepare")
    assert (ran.code, ran.err) == (0, "")
    assert paths.DATASET.read_bytes() == before
    numbers = files.read_json(paths.METRICS / "prepare.json")
    assert {name: numbers[f"{name}_images"] for name in dataset.SPLITS} == {
        "train": 987,
        "pool": 270,
        "validation": 180,
        "test": 360,
    }
    assert "digits: 1 x 8 x 8 pixels, 10 classes" in flat(ran.out)


def test_prepare_warns_of_leaked_images(advmoe: Advmoe, project: Path, edit: Edit) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    for name in ("train", "test"):  # every test image is an image of the training file
        (project / "data").mkdir(exist_ok=True)
        np.savez(project / "data" / f"{name}.npz", images=images, labels=np.arange(20) % 2)
    source = {
        "kind": "npz",
        "train": "data/train.npz",
        "test": "data/test.npz",
        "per_class": None,
        "test_per_class": None,
    }
    edit({"prepare.source": source, "prepare.splits": {"pool": 1, "validation": 1, "test": None}})
    ran = advmoe("prepare")
    assert ran.code == 0
    assert re.fullmatch(r"warning: 18 test image\(s\) also occur in the training split, pixel for pixel\n", ran.err)


def test_prepare_warns_of_files_that_dvc_does_not_watch(advmoe: Advmoe, project: Path, edit: Edit) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(project / "elsewhere.npz", images=images, labels=np.arange(40) % 2)
    source = {"kind": "npz", "train": "elsewhere.npz", "test": None, "per_class": None, "test_per_class": None}
    edit({"prepare.source": source, "prepare.splits": {"pool": 2, "validation": 4, "test": 4}})
    ran = advmoe("prepare")
    assert ran.code == 0
    assert ran.err.startswith("warning: elsewhere.npz lies outside data/")


def test_prepare_refuses_a_source_that_is_not_there(advmoe: Advmoe, project: Path, edit: Edit) -> None:
    edit({"prepare.source": {"kind": "folder", "path": "data/images", "size": None, "channels": 1}})
    before = tree(project)
    assert sentence(advmoe("prepare")) == "data/images: no such folder"
    assert tree(project) == before


@pytest.mark.parametrize("command", ["pretrain", "baseline"])
def test_an_unknown_name_lists_the_known(advmoe: Advmoe, project: Path, command: str) -> None:
    section = {"pretrain": "experts", "baseline": "baseline"}[command]
    known = ", ".join(read_yaml(project / "params.yaml")[section])
    before = tree(project)
    assert (
        sentence(advmoe(command, "nobody")) == f"params.yaml: key '{section}.nobody' is missing; known there: {known}"
    )
    assert tree(project) == before


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        (["pretrain", "clean"], "artifacts/prepare/dataset.safetensors"),
        (["baseline", "standard"], "artifacts/prepare/dataset.safetensors"),
        (["train"], "artifacts/pretrain/clean.safetensors"),
        (["evaluate", "--record"], "artifacts/baseline/standard.safetensors"),
        (["poison", "badnets"], "artifacts/prepare/dataset.safetensors"),
        (["poison", "badnets", "--record"], "artifacts/prepare/dataset.safetensors"),
        (["poison", "badnets", "--rate", "0.2"], "artifacts/prepare/dataset.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_stage_without_its_inputs_names_what_is_missing(
    advmoe: Advmoe, project: Path, command: list[str], missing: str
) -> None:
    (project / missing).unlink(missing_ok=True)
    ran = advmoe(*command)
    assert sentence(ran).startswith(f"{missing}: no such file; `dvc repro`")


# ---- a quick question ------------------------------------------------------------------------------------------------


def answer(project: Path) -> dict[str, Any]:
    """The only report in runs/."""
    (report,) = (
        path for path in (project / "runs").glob("*.json") if not path.name.endswith(("verdict.json", "run.json"))
    )
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def test_a_question_is_answered_beside_the_tracked_results(advmoe: Advmoe, project: Path) -> None:
    before = tree(project)
    ran = advmoe("evaluate", "--attack", "pgd", "--epsilon", "4/255", "--steps", "3", "--limit", "30", "--no-checks")
    assert (ran.code, ran.err) == (
        0,
        "warning: no checks were run, so these numbers are not validated\n",
    )
    report = answer(project)
    assert (report["model"], report["epsilon"]) == (str(paths.MIXTURE), 4 / 255)
    assert list(report["attacks"]) == ["pgd"]
    assert report["attacks"]["pgd"]["settings"]["steps"] == 3
    assert report["identity"] == classifiers.load(paths.MIXTURE).header.sha256
    after = tree(project)
    assert {name: content for name, content in after.items() if not name.startswith("runs/")} == before
    assert "accuracy on 30 images, L-inf epsilon 4/255" in flat(ran.out)
    assert "written to runs/evaluate-" in ran.out


def test_the_answer_is_the_accuracy_of_the_model(advmoe: Advmoe, project: Path) -> None:
    advmoe("evaluate", "--limit", "30", "--no-checks")
    accuracy = answer(project)["accuracy"]
    split = dataset.load(paths.DATASET)["test"].first(30)
    right = inference.predict(classifiers.load(paths.MIXTURE).model, split.pixels(), 30).argmax(1) == split.labels
    assert accuracy["clean"] == Proportion.from_mask(right).as_dict()
    assert set(accuracy) == {"clean", "fgsm", "pgd", "worst"}  # without --attack all of params.yaml
    assert accuracy["worst"]["correct"] <= min(accuracy["fgsm"]["correct"], accuracy["pgd"]["correct"])


def test_a_question_without_an_epsilon_takes_the_threat_model(advmoe: Advmoe, project: Path) -> None:
    advmoe("evaluate", "--attack", "fgsm", "--no-checks")
    assert answer(project)["epsilon"] == 0.1
    assert answer(project)["accuracy"]["clean"]["total"] == 24  # and evaluate.limit


def test_the_adversarial_images_of_an_answer_replay(advmoe: Advmoe, project: Path) -> None:
    advmoe("evaluate", "--attack", "pgd", "--limit", "20", "--no-checks")
    (file,) = (project / "runs").glob("*.safetensors")
    kept = artifacts.load(file).tensors
    images, labels = kept["mixture.pgd.images"], kept["labels"]
    assert float((images - kept["images"].float() / 255).abs().max()) <= 0.1 + 1e-6
    again = inference.predict(classifiers.load(paths.MIXTURE).model, images, 7).argmax(1)
    assert torch.equal(again, kept["mixture.pgd.predicted"])
    assert torch.equal((again == labels) & kept["mixture.clean.correct"], kept["mixture.pgd.correct"])
    assert not list(machine.machine().state_dir.iterdir())  # answered: nothing to resume


def test_a_question_with_checks_writes_its_verdict(advmoe: Advmoe, project: Path) -> None:
    ran = advmoe("evaluate", "--attack", "pgd", "--limit", "24")
    assert ran.code == 0  # whatever the verdict
    (file,) = (project / "runs").glob("*.verdict.json")
    judged = json.loads(file.read_text())["mixture"]
    assert [check["check"] for check in judged["checks"]] == list(verdict.TITLES)
    report = answer(project)
    assert report["verdict"] == judged["verdict"]
    assert (report["accuracy"]["worst"] is None) == (judged["verdict"] == "fail")
    assert report["accuracy"]["clean"] is not None


def test_a_missing_factory_is_named_as_it_was_typed(advmoe: Advmoe, project: Path) -> None:
    del project
    ran = advmoe("evaluate", "--model", "bad/nofile.py:factory")
    assert (ran.code, ran.err) == (2, "error: bad/nofile.py:factory: no such file bad/nofile.py\n")


def test_presets_take_part_and_a_single_expert_can_be_asked(advmoe: Advmoe, project: Path) -> None:
    options = ("--limit", "4", "--steps", "1", "--no-checks")
    assert advmoe("evaluate", "--attack", "adaptive", *options).code == 0
    assert {"gate-frozen", "misrouting", "experts"} <= set(answer(project)["attacks"])
    shutil.rmtree(project / "runs")
    ran = advmoe("evaluate", "--attack", "adaptive", "--expert", "pgd-1", *options)
    assert ran.code == 0
    assert "mixture.safetensors, expert pgd-1: accuracy on 4 images" in " ".join(ran.out.split())
    assert "pgd: steps 1, step_size" in ran.out
    report = answer(project)
    assert report["expert"] == "pgd-1"
    assert "gate-frozen" not in report["attacks"]  # an expert has no gate


def test_steps_spare_the_attacks_without_steps_when_none_was_asked_for(advmoe: Advmoe, project: Path) -> None:
    assert advmoe("evaluate", "--attack", "pgd", "--attack", "fgsm", "--steps", "1", "--no-checks").code == 0
    attacks = answer(project)["attacks"]
    assert (attacks["fgsm"]["settings"], attacks["pgd"]["settings"]["steps"]) == ({"kind": "fgsm"}, 1)


OWN_ATTACK = """
def attack(model, images, labels, *, ball, draws, fooled):
    return ball.project(images + ball.epsilon * draws.uniform(images).sign(), images)

def broken(model, images, labels, **_):
    raise RuntimeError("out of ideas")
"""


def test_a_users_own_attack_is_one_among_others(advmoe: Advmoe, project: Path) -> None:
    (project / "mine.py").write_text(OWN_ATTACK)
    assert advmoe("evaluate", "--attack", "mine.py:attack", "--limit", "100", "--no-checks").code == 0
    assert answer(project)["attacks"]["mine.py:attack"]["attacked"] > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--epsilon", "8"], "--epsilon: epsilon 8 is more than the whole pixel range [0, 1]; did you mean 8/255?"),
        (["--epsilon", "nan"], "--epsilon: epsilon must be a finite number, not nan"),
        (["--epsilon", "1/0"], "--epsilon: epsilon '1/0' divides by zero"),
        (["--epsilon", "-0.1"], "--epsilon: epsilon is a distance and cannot be negative, but is -0.1"),
        (["--epsilon", ""], "--epsilon: epsilon must be a number or a fraction such as 8/255, not ''"),
        (["--epsilon", "0"], "epsilon must be greater than 0"),
        (["--attack", "fgsm", "--steps", "3"], "--steps: fgsm has no number of steps"),
        (["--attack", "carlini"], "--attack carlini: unknown; attacks are fgsm, pgd, pgd-margin"),
        (["--attack", "none.py:attack"], "none.py:attack: no such file none.py"),
        (["--attack", "mine.py:missing"], "mine.py:missing: mine.py has no function 'missing'"),
        (["--attack", "mine.py:broken", "--limit", "100"], "mine.py:broken raised RuntimeError: out of ideas"),
        (["--model", "none.safetensors"], "none.safetensors: no such file"),
        (
            ["--model", "params.yaml"],
            "--model params.yaml: must be an artifact (.safetensors) or path/to/model.py:factory",
        ),
        (["--model", str(paths.DATASET)], f"{paths.DATASET}: holds a dataset, but a classifier is needed here"),
        (
            ["--expert", "fgsm-9"],
            "--expert fgsm-9: artifacts/train/mixture.safetensors has no such expert; it has clean, pgd-1",
        ),
        (["--weights", "w.pt"], "--weights: artifacts/train/mixture.safetensors contains its weights"),
        (["--data", "none.npz"], "none.npz: no such file"),
    ],
)
def test_an_impossible_question_is_refused(advmoe: Advmoe, project: Path, options: list[str], expected: str) -> None:
    (project / "mine.py").write_text(OWN_ATTACK)
    before = {name: content for name, content in tree(project).items() if "__pycache__" not in name}
    assert sentence(advmoe("evaluate", *options)).startswith(expected)
    assert {name: content for name, content in tree(project).items() if "__pycache__" not in name} == before


def test_attacks_lists_what_there_is(advmoe: Advmoe) -> None:
    said = advmoe("attacks").out
    for name in (*presets.STANDARD_ATTACKS, "transfer", "autoattack", "adaptive", "path/to/file.py:function"):
        assert name in said


def test_a_model_for_other_images_is_refused(advmoe: Advmoe, project: Path) -> None:
    mixture = classifiers.load(paths.MIXTURE)
    architecture = mixture.about.architecture
    facts = mixture.about.facts.model_copy(update={"height": 16})
    other = project / "other.safetensors"
    classifiers.save(
        other, mixture.model, architecture, facts, params={}, inputs={}, seed=0, metrics={}, seconds=0.0
    )  # fmt: skip
    expected = (
        "trained for 10 classes of images (1, 16, 8), but artifacts/prepare/dataset.safetensors has 10 classes of"
    )
    assert expected in sentence(advmoe("evaluate", "--model", other))


# ---- poison ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_images(project: Path, edit: Edit) -> Path:
    """The project with a hundred training images, in one batch."""
    from stages import prepare

    edit(
        {
            "prepare.splits": {"pool": 1517, "validation": 60, "test": 120},
            "pretrain.batch_size": 128,
            "pretrain.validation.steps": 1,
        }
    )
    prepare.run()
    victim_training._clean_dataset.cache_clear()
    return project


RECORDING = [["evaluate"], ["poison", "badnets"], ["extract", "knockoff"], ["membership"]]
OPTIONS = {"evaluate": "--limit=3", "poison": "--rate=0.2", "extract": "--budget=5", "membership": "--victim=mixture"}


@pytest.mark.parametrize("command", RECORDING, ids=" ".join)
def test_record_takes_no_other_option(advmoe: Advmoe, project: Path, command: list[str]) -> None:
    before = tree(project)
    refused = sentence(advmoe(*command, "--record", OPTIONS[command[0]]))
    assert refused == "--record uses the settings of params.yaml and cannot be combined with other options"
    assert tree(project) == before


def test_poison_without_options_writes_to_runs(advmoe: Advmoe, few_images: Path) -> None:
    before = tree(few_images)
    assert advmoe("poison", "badnets").code == 0
    after = tree(few_images)
    assert {name: content for name, content in after.items() if not name.startswith("runs/")} == before
    (folder,) = (few_images / "runs").iterdir()
    assert files.read_json(folder / "runs.json")["runs"]


def test_evaluate_without_options_writes_to_runs(advmoe: Advmoe, project: Path) -> None:
    before = tree(project)
    assert advmoe("evaluate").code == 0
    after = tree(project)
    assert {name: content for name, content in after.items() if not name.startswith("runs/")} == before
    assert list(answer(project)["attacks"]) == ["fgsm", "pgd"]


def test_the_version_is_told(advmoe: Advmoe) -> None:
    ran = advmoe("--version")
    assert (ran.code, ran.out) == (0, f"advmoe {metadata.version('advmoe')}\n")


def test_completion_is_offered(advmoe: Advmoe) -> None:
    assert "--install-completion" in advmoe("--help").out


def test_use_shows_what_a_profile_changes(advmoe: Advmoe, inputs_only: Path) -> None:
    before = (inputs_only / "params.yaml").read_bytes()
    ran = advmoe("use", "smoke", "--show")
    assert "model.width: 16 -> 4" in ran.out.splitlines()
    assert (inputs_only / "params.yaml").read_bytes() == before


def test_poison_with_record_is_the_stage(advmoe: Advmoe, few_images: Path) -> None:
    ran = advmoe("poison", "badnets", "--record")
    assert (ran.code, ran.err) == (0, "")
    said = flat(ran.out)
    assert "clean twins to train: standard (seed + 0)" in said  # no baseline was trained by the pipeline
    assert "badnets: % on 24 test images; rates are shares of the training set; one seed" in said
    assert files.read_json(paths.metrics("poison", "badnets"))["attack"] == "badnets"
    assert (few_images / "plots/poison/badnets/curve.csv").is_file()
    assert not (few_images / "runs").exists()


def test_poison_with_an_option_is_a_question_beside_the_tracked_results(advmoe: Advmoe, few_images: Path) -> None:
    before = tree(few_images)
    ran = advmoe("poison", "badnets", "--rate", "0.2", "--rate", "0.3", "--target", "3", "--victim", "standard")
    assert (ran.code, ran.err) == (0, "")
    after = tree(few_images)
    assert {name: content for name, content in after.items() if not name.startswith("runs/")} == before
    (folder,) = (few_images / "runs").iterdir()
    assert folder.name.startswith("poison-badnets-")
    runs = files.read_json(folder / "runs.json")["runs"]
    assert [(run["rate"], run["n_poison"]) for run in runs] == [(0.2, 20), (0.3, 30)]
    assert str(folder.relative_to(few_images)) in ran.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["nobody"], "poison.attacks has no 'nobody'; there are badnets"),
        (["nobody", "--rate", "0.1"], "poison.attacks has no 'nobody'; there are badnets"),
        (["badnets", "--rate", "0"], "poison badnets: rates.0: input should be greater than 0, got 0.0"),
        (["badnets", "--rate", "1"], "poison badnets: rates must lie between 0 and 1 for badnets"),
        (["badnets", "--rate", "1.5"], "poison badnets: rates.0: input should be less than or equal to 1, got 1.5"),
        (["badnets", "--rate", "-0.1"], "poison badnets: rates.0: input should be greater than 0, got -0.1"),
        (["badnets", "--rate", "nan"], "poison badnets: rates.0: input should be "),
        (["badnets", "--rate", "0.0001"], "rate 0.0001 of 987 images (the training set) rounds to zero images"),
        (["badnets", "--rate", "0.95"], "938 images should be poisoned, but every class but 0 holds only 8"),
        (["badnets", "--target", "10"], "class 10 does not exist; the classes are 0 to 9"),
        (["badnets", "--victim", "nobody"], "victim 'nobody' is not known; there are mixture, mixture-joint, standard"),
        (["badnets", "--defence", "nobody"], "defence 'nobody' is not known; there are spectral, clustering, strip"),
        (["badnets", "--seed", "0", "--seed", "0"], "poison badnets: seeds contains duplicates"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_impossible_poison_is_refused(advmoe: Advmoe, project: Path, options: list[str], expected: str) -> None:
    before = tree(project)
    assert sentence(advmoe("poison", *options)).startswith(expected)
    assert tree(project) == before


@pytest.mark.parametrize(
    ("attack", "options", "expected"),
    [
        ({"kind": "label-flip-random"}, ["--target", "3"], "--target: label-flip-random has no target class"),
        (
            {"kind": "label-flip-targeted", "source": 4, "target": 9},
            ["--target", "4"],
            "--target: source and target are both class 4, so nothing would be flipped",
        ),
        (
            {"kind": "label-flip-targeted", "source": 4, "target": 4},
            [],
            "params.yaml: poison.attacks.badnets.attack: source and target are both class 4",
        ),
        ({"kind": "badnets", "size": 9, "target": 0}, [], "a trigger of 9 x 9 pixels is larger than the images, 8 x 8"),
        ({"kind": "mine"}, [], "params.yaml: poison.attacks.badnets.attack: input tag 'mine' found"),
    ],
    ids=str,
)
def test_attacks_that_cannot_be_are_refused(
    advmoe: Advmoe, project: Path, edit: Edit, attack: dict[str, Any], options: list[str], expected: str
) -> None:
    edit({"poison.attacks.badnets.attack": attack})
    before = tree(project)
    assert sentence(advmoe("poison", "badnets", *options)).startswith(expected)
    assert tree(project) == before


# ---- predict and inspect ---------------------------------------------------------------------------------------------


@pytest.fixture
def digit(project: Path) -> Path:
    """The first test image as a PNG."""
    path = project / "digit.png"
    Image.fromarray(dataset.load(paths.DATASET)["test"].images[0, 0].numpy()).save(path)
    return path


def test_predict_says_what_the_model_says(advmoe: Advmoe, digit: Path) -> None:
    ran = advmoe("predict", digit)
    assert (ran.code, ran.err) == (0, "")
    model = classifiers.load(paths.MIXTURE).model
    logits = inference.predict(model, dataset.load(paths.DATASET)["test"].pixels()[:1], 1)
    probability, label = torch.softmax(logits, dim=1).max(dim=1)
    assert f"{digit}: {int(label)} ({float(probability):.1%})" in ran.out


def test_predict_shows_who_voted(advmoe: Advmoe, digit: Path) -> None:
    said = flat(advmoe("predict", digit).out)
    votes = re.findall(r"(clean|pgd-1) (\d\.\d{3}) (\d) ([\d.]+)%", said)
    assert [expert for expert, *_ in votes] == ["clean", "pgd-1"]
    assert sum(float(weight) for _, weight, *_ in votes) == pytest.approx(1, abs=0.002)


def test_predict_takes_several_files_of_any_size_and_mode(advmoe: Advmoe, digit: Path) -> None:
    large = digit.with_name("large.jpg")
    Image.open(digit).convert("RGB").resize((40, 30)).save(large)
    ran = advmoe("predict", digit, large)
    assert ran.code == 0
    assert ran.out.count(" (") == 2
    assert f"{large}: " in ran.out


def test_a_prediction_does_not_depend_on_the_other_files(advmoe: Advmoe, digit: Path) -> None:
    other = digit.with_name("other.png")
    Image.fromarray(dataset.load(paths.DATASET)["test"].images[1, 0].numpy()).save(other)
    alone = next(line for line in advmoe("predict", digit).out.splitlines() if str(digit) in line)
    assert alone in advmoe("predict", other, digit).out


def test_predict_in_its_own_process(digit: Path, project: Path) -> None:
    ran = in_a_process("predict", str(digit), cwd=project)
    assert (ran.code, ran.err) == (0, "")
    assert re.search(rf"{re.escape(str(digit))}: \d \([\d.]+%\)", ran.out)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["none.png"], "none.png: no such file"),
        (["params.yaml"], "params.yaml: cannot be read as an image"),
        (["digit.png", "dvc.yaml"], "dvc.yaml: cannot be read as an image"),
        (["digit.png", "--model", "none.safetensors"], "none.safetensors: no such file"),
        (["digit.png", "--model", str(paths.DATASET)], f"{paths.DATASET}: holds a dataset"),
    ],
)
def test_what_cannot_be_predicted_is_refused(advmoe: Advmoe, digit: Path, options: list[str], expected: str) -> None:
    del digit
    ran = advmoe("predict", *options)
    assert sentence(ran).startswith(expected)
    assert ran.out == ""


def test_inspect_prints_the_header(advmoe: Advmoe, project: Path) -> None:
    del project
    ran = advmoe("inspect", paths.MIXTURE)
    assert (ran.code, ran.err) == (0, "")
    header = json.loads(ran.out)
    assert header == classifiers.load(paths.MIXTURE).header.model_dump()
    assert header["about"]["architecture"]["experts"] == ["clean", "pgd-1"]


def test_inspect_checks_the_content(advmoe: Advmoe, project: Path) -> None:
    del project
    content = bytearray(paths.MIXTURE.read_bytes())
    content[-5] ^= 1
    paths.MIXTURE.write_bytes(content)
    assert sentence(advmoe("inspect", paths.MIXTURE)).startswith(
        f"{paths.MIXTURE}: content does not match its checksum"
    )


def test_inspect_refuses_in_its_own_process(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nonsense")
    assert sentence(in_a_process("inspect", "a.safetensors", cwd=tmp_path)).startswith(
        "a.safetensors: not a safetensors"
    )


# ---- info, use, check, results ---------------------------------------------------------------------------------------


def test_info_shows_this_machine(advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADVMOE_DEVICE", "cpu")
    ran = advmoe("info")
    assert (ran.code, ran.err) == (0, "")
    said = flat(ran.out)
    assert "device cpu" in said
    assert f"threads 1 of {os.cpu_count()} cores" in said


def test_info_refuses_a_device_that_is_not_there(advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ADVMOE_DEVICE", "cuda")
    expected = "environment: ADVMOE_DEVICE=cuda, but PyTorch finds no such device here"
    assert sentence(advmoe("info")) == expected


def test_use_lays_a_profile_over_params(advmoe: Advmoe, inputs_only: Path) -> None:
    (inputs_only / "profiles" / "mine.yaml").write_text("epsilon: 12/255   # mine\n")
    ran = advmoe("use", "mine")
    assert (ran.code, ran.out, ran.err) == (0, "params.yaml: epsilon\n", "")
    assert "epsilon: 12/255" in (inputs_only / "params.yaml").read_text()
    assert advmoe("use", "mine").out == "params.yaml already agrees with mine\n"


def test_use_refuses_an_unknown_profile(advmoe: Advmoe, inputs_only: Path) -> None:
    before = tree(inputs_only)
    message = sentence(advmoe("use", "nothing"))
    assert message.startswith("profiles/nothing.yaml: no such profile; known are ")
    assert tree(inputs_only) == before


@pytest.mark.parametrize(
    ("pending", "expected"),
    [
        (["prepare", "pretrain@clean"], "dvc repro would run: prepare, pretrain@clean"),
        ([], "dvc repro has nothing to do"),
    ],
)
def test_check_says_what_would_run(
    advmoe: Advmoe, inputs_only: Path, monkeypatch: pytest.MonkeyPatch, pending: list[str], expected: str
) -> None:
    del inputs_only
    monkeypatch.setattr(validation, "pending_stages", lambda: pending)
    ran = advmoe("check")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == ["params.yaml, dvc.yaml and the environment are valid", expected]


def test_check_asks_dvc(advmoe: Advmoe, inputs_only: Path) -> None:
    """With the real DVC, in a copy of the project in which nothing was built."""
    for folder in ("advmoe", "stages", "data"):
        shutil.copytree(ROOT / folder, inputs_only / folder, ignore=shutil.ignore_patterns("__pycache__"))
    files.write_text(inputs_only / ".dvc" / "config", "[core]\n    no_scm = true\n    analytics = false\n")
    ran = advmoe("check")
    assert ran.code == 0, ran.err
    pending = ran.out.partition("dvc repro would run: ")[2].split(", ")
    assert pending[:3] == ["code", "inputs", "prepare"]
    assert {stage.strip() for stage in pending[-8:]} == {
        "report",
        "evaluate",
        "extract@jbda",
        "extract@knockoff",
        "membership",
        "poison@badnets",
        "poison@blended",
        "poison@label-flip",
    }
    assert {"pretrain@clean", "pretrain@pgd-4", "train", "baseline@adversarial", "baseline@uniform"} <= set(pending)


def test_check_outside_of_dvc_is_one_sentence(inputs_only: Path) -> None:
    assert sentence(in_a_process("check", cwd=inputs_only)).startswith("dvc: you are not inside of a DVC repository")


def test_one_more_expert_is_watched_by_dvc_as_it_is(
    advmoe: Advmoe, inputs_only: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "pending_stages", list)
    extra = {"seed": 90, "adversary": {"kind": "clean"}}
    names = [*read_yaml(inputs_only / "params.yaml")["train"]["experts"], "extra"]
    edit({"experts.extra": extra, "train.experts": names})
    assert advmoe("check").code == 0
    dvc_file = inputs_only / "dvc.yaml"
    listed = "".join(f"\n      - artifacts/pretrain/{name}.safetensors" for name in names[:-1])
    dvc_file.write_text(dvc_file.read_text().replace("\n      - artifacts/pretrain\n", f"{listed}\n"))
    assert sentence(advmoe("check")) == (
        "dvc.yaml: stages.train.deps must list artifacts/pretrain/extra.safetensors, or DVC will not see it change"
    )


EXTRA = {  # a baseline more, which params.yaml may use at once
    "kind": "single",
    "backbone": "cnn",
    "match": "nothing",
    "seed": 90,
    "adversary": {"kind": "clean"},
}


@pytest.mark.parametrize("key", ["poison.attacks.badnets.victims", "extract.attacks.knockoff.victims"])
def test_check_finds_a_baseline_that_dvc_does_not_watch(
    advmoe: Advmoe, inputs_only: Path, edit: Edit, key: str
) -> None:
    del inputs_only
    edit({"baseline.extra": EXTRA, key: ["extra"]})
    assert sentence(advmoe("check")) == (
        f"dvc.yaml: stages.{key.partition('.')[0]}.deps must list artifacts/baseline/extra.safetensors, "
        "or DVC will not see it change"
    )


def test_check_knows_that_a_watched_folder_watches_what_is_in_it(
    advmoe: Advmoe, inputs_only: Path, edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "pending_stages", list)
    names = read_yaml(inputs_only / "params.yaml")["evaluate"]["baselines"]
    edit({"baseline.extra": EXTRA, "evaluate.baselines": [*names, "extra"]})
    assert advmoe("check").code == 0
    dvc_file = inputs_only / "dvc.yaml"
    written = dvc_file.read_text()
    assert written.count("      - artifacts/baseline\n") == 1
    dvc_file.write_text(
        written.replace("      - artifacts/baseline\n", "      - artifacts/baseline/extra.safetensors\n")
    )
    assert sentence(advmoe("check")) == (
        f"dvc.yaml: stages.evaluate.deps must list artifacts/baseline/{names[0]}.safetensors, "
        "or DVC will not see it change"
    )


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("params.yaml", "a: [", "params.yaml: not valid YAML"),
        ("dvc.yaml", "a: [", "dvc.yaml: not valid YAML"),
        ("dvc.yaml", "stages: {}", "dvc.yaml: stages.train.deps must list "),
        pytest.param(
            "dvc.yaml",
            "stages:\n",
            "dvc.yaml: ",
        ),
    ],
)
def test_check_names_the_broken_file(advmoe: Advmoe, inputs_only: Path, file: str, text: str, expected: str) -> None:
    (inputs_only / file).write_text(text)
    assert sentence(advmoe("check")).startswith(expected)


def test_check_refuses_a_wrong_epsilon(advmoe: Advmoe, inputs_only: Path, edit: Edit) -> None:
    del inputs_only
    edit({"epsilon": 8})
    expected = "params.yaml: epsilon: epsilon 8 is more than the whole pixel range [0, 1]; did you mean 8/255?"
    assert sentence(advmoe("check")) == expected


def share(correct: int) -> dict[str, float]:
    return Proportion.from_mask(torch.arange(200) < correct).as_dict()


@pytest.fixture
def evaluated(project: Path) -> Path:
    """Results as `evaluate` writes them, for two models."""
    accuracies = {"mixture": (180, 120), "baseline/standard": (190, 10)}
    for name, (clean, attacked) in accuracies.items():
        report = {"schema_version": 2, "model": name, "verdict": "pass", "withheld": []}
        report["accuracy"] = {"clean": share(clean), "pgd": share(attacked), "worst": share(attacked)}
        files.write_json(paths.EVALUATION / f"{name.replace('/', '-')}.json", report)
    files.write_json(paths.SUMMARY, {"schema_version": 2, "epsilon": 0.1, "images": 200} | dict.fromkeys(accuracies))
    return project


def test_results_shows_all_models_in_the_order_of_the_summary(advmoe: Advmoe, evaluated: Path) -> None:
    before = tree(evaluated)
    ran = advmoe("results")
    assert (ran.code, ran.err) == (0, "")
    said = flat(ran.out)
    assert "200 test images, L-inf epsilon 0.1 = 25.5/255" in said
    for percent in ("90.0 [85.1,", "60.0 [53.1,", "95.0 [91.0,", "5.0 [2.7,"):  # Wilson intervals
        assert percent in said
    assert said.index("mixture") < said.index("baseline/standard")
    assert tree(evaluated) == before


def test_results_withhold_what_a_check_forbids(advmoe: Advmoe, evaluated: Path) -> None:
    path = evaluated / paths.EVALUATION / "mixture.json"
    report = json.loads(path.read_text()) | {"verdict": "fail", "withheld": ["gradients: softmax output"]}
    report["accuracy"] |= {"pgd": None, "worst": None}
    files.write_json(path, report)
    ran = advmoe("results")
    assert ran.code == 0
    assert ran.err == "warning: mixture: withheld, gradients: softmax output\n"
    assert "withheld" in ran.out
    assert "60.0 [53.1," not in flat(ran.out)


def test_results_repeats_the_alarms_of_training(advmoe: Advmoe, evaluated: Path) -> None:
    del evaluated
    alarm = "fgsm-1: FGSM accuracy 0.900 but PGD accuracy 0.100 on validation: overfitted to one-step attacks"
    files.write_json(paths.metrics("pretrain", "fgsm-1"), {"validation": {}, "alarms": [alarm]})
    assert advmoe("results").err == f"warning: {alarm}\n"


def test_results_before_an_evaluation_says_what_builds_them(advmoe: Advmoe, project: Path) -> None:
    del project
    assert sentence(advmoe("results")) == "metrics/evaluate.json: no such file; `make repro` builds it"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "metrics/evaluate.json: cannot be read as JSON"),
        ("[]", "metrics/evaluate.json: not a result of this version of advmoe"),
        ('{"schema_version": 0}', "metrics/evaluate.json: not a result of this version of advmoe"),
    ],
)
def test_results_that_cannot_be_read_are_named(advmoe: Advmoe, evaluated: Path, text: str, expected: str) -> None:
    (evaluated / paths.SUMMARY).write_text(text)
    assert sentence(advmoe("results")).startswith(expected)


def test_results_without_their_reports_are_refused(advmoe: Advmoe, evaluated: Path) -> None:
    shutil.rmtree(evaluated / paths.EVALUATION)
    assert "metrics/evaluate" in sentence(advmoe("results"))


def test_results_with_a_foreign_report_are_refused(advmoe: Advmoe, evaluated: Path) -> None:
    files.write_json(evaluated / paths.EVALUATION / "other.json", {"something": "else"})
    assert "metrics/evaluate/other.json" in sentence(advmoe("results"))


# ---- the entry point itself ------------------------------------------------------------------------------------------


def test_an_interruption_is_no_traceback(advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(validation, "check", interrupt)
    ran = advmoe("check")
    assert ran.code == 130
    assert "Traceback" not in ran.err


def test_a_message_with_brackets_is_not_taken_for_markup(advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise UserError("params.yaml: [bold]a[/bold] [/] is " + "very " * 60 + "long")

    monkeypatch.setattr(validation, "check", refuse)
    assert sentence(advmoe("check")).startswith("params.yaml: [bold]a[/bold] [/] is very very")


def test_our_own_mistakes_are_not_hidden(advmoe: Advmoe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(validation, "check", fail)
    with pytest.raises(ZeroDivisionError):
        advmoe("check")
