"""The real pipeline, small: every stage through DVC in a repository of its own, as `make repro PROFILE=smoke` does."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from ruamel.yaml import YAML

from advmoe.core import paths

EXPERTS = ["clean", *(f"{kind}-{number}" for kind in ("fgsm", "pgd") for number in range(1, 5))]
POISON = {"badnets": ["mixture", "standard", "adversarial"], "blended": ["standard", "adversarial"]}  # of smoke.yaml
THREATS = [*(f"poison@{name}" for name in POISON), "extract@knockoff", "extract@jbda", "membership"]
BASELINES = ["adversarial", "equal-parameters", "standard", "uniform"]
PGD_EXPERTS = [f"pretrain@{name}" for name in EXPERTS if name.startswith("pgd")]

pytestmark = pytest.mark.pipeline


class Project:
    """A copy of the project with a git history of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        # one thread: what is compared bit by bit must not depend on the machine's cores
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("ADVMOE_")}
        self.environment |= {
            "ADVMOE_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, *command: str) -> str:
        """Run a command in the project; returns its output, fails the test if the command fails."""
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def dvc(self, *arguments: str) -> str:
        """Run DVC."""
        return self.run(sys.executable, "-m", "dvc", *arguments)

    def advmoe(self, *arguments: str) -> str:
        """Run advmoe as DVC does."""
        return self.run(sys.executable, "-m", "advmoe", *arguments)

    def params(self, change: str, value: object) -> None:
        """Set one key (with dots) of params.yaml."""
        yaml, path = YAML(), self.root / "params.yaml"
        content = yaml.load(path.read_text())
        *parents, last = change.split(".")
        section = content
        for parent in parents:
            section = section[parent]
        section[last] = value
        with path.open("w") as file:
            yaml.dump(content, file)

    def commit(self, message: str) -> None:
        """Commit everything."""
        self.run("git", "add", "--all")
        self.run("git", "commit", "--quiet", "--message", message)


def stages_run(output: str) -> list[str]:
    """The stages that DVC says it ran."""
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage '")]


def contents(project: Project) -> dict[str, bytes]:
    """Every artifact, byte for byte, by path."""
    return {
        str(path.relative_to(project.root)): path.read_bytes()
        for path in sorted((project.root / "artifacts").rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """The pipeline, built once from nothing with the smoke profile, and committed."""
    project = Project(tmp_path_factory.mktemp("pipeline") / "advmoe")
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in tracked.stdout.splitlines():
        # the aggregate is an input: other seeds are other runs
        made_here = name.startswith(("metrics/", "plots/")) and name != str(paths.AGGREGATE)
        if (ROOT / name).is_file() and not made_here and name != "dvc.lock":
            (project.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, project.root / name)
    project.run("git", "init", "--quiet")
    project.run("git", "config", "user.name", "test")
    project.run("git", "config", "user.email", "test@example.org")
    project.advmoe("use", "smoke")
    project.dvc("repro")
    project.commit("a small run")
    yield project
    shutil.rmtree(project.root, ignore_errors=True)


def test_every_stage_leaves_its_files(built: Project) -> None:
    expected = ["artifacts/prepare/dataset.safetensors", "artifacts/train/mixture.safetensors"]
    expected += [f"artifacts/pretrain/{name}.safetensors" for name in EXPERTS]
    for name in BASELINES:
        expected += [
            f"artifacts/baseline/{name}.safetensors",
            f"plots/baseline/{name}.csv",
            f"metrics/baseline/{name}.json",
        ]
    expected += ["artifacts/evaluate/adversarial.safetensors", "plots/evaluate/robustness.csv", "metrics/evaluate.json"]
    for name in POISON:
        expected += [f"metrics/poison/{name}.json", f"metrics/poison-runs/{name}.json"]
        expected += [f"plots/poison/{name}/curve.csv", f"plots/poison/{name}/examples.png"]
    for rate in ("0.05", "0.2"):
        folder = f"artifacts/poison/badnets/rate-{rate}-seed-0-trial-0"
        expected += [f"{folder}.safetensors", *(f"{folder}/{victim}.safetensors" for victim in POISON["badnets"])]
    folder = "artifacts/poison/blended/rate-0.2-seed-0-trial-0"
    expected += [f"{folder}/{victim}{end}.safetensors" for victim in POISON["blended"] for end in ("", "-oracle")]
    for name in ("knockoff", "jbda"):
        expected += [f"metrics/extract/{name}.json", f"metrics/extract-runs/{name}.json"]
        expected += [f"plots/extract/{name}/curve.csv", f"artifacts/extract/{name}/control-seed-0/same.safetensors"]
    for title in ("mixture-soft", "mixture-top1", "adversarial-soft", "adversarial-top1"):
        folder = f"artifacts/extract/knockoff/{title}-seed-0"
        expected += [f"{folder}.safetensors", *(f"{folder}/{end}.safetensors" for end in ("same-50", "small-100"))]
    expected += ["metrics/membership.json", "metrics/membership/all.json"]
    assert [name for name in expected if not (built.root / name).is_file()] == []


def test_the_numbers_of_poison_are_complete(built: Project) -> None:
    head = json.loads((built.root / "metrics/poison/badnets.json").read_text())
    assert head["images"] == 60
    for victim in POISON["badnets"]:
        assert set(head[victim]) == {"0.05", "0.2"}
        for means in head[victim].values():
            assert 0 <= means["asr"] <= 1
            assert -1 <= means["d_clean_acc"] <= 1
    assert {f"asr_{name}" for name in EXPERTS} | {"gate_shift"} <= head["mixture"]["0.2"].keys()
    runs = json.loads((built.root / "metrics/poison-runs/blended.json").read_text())["runs"]
    assert [run["tpr"]["accuracy"] for run in runs if run["defence"] == "oracle"] == [1.0, 1.0]


def test_the_numbers_of_extraction_and_membership_are_complete(built: Project) -> None:
    head = json.loads((built.root / "metrics/extract/knockoff.json").read_text())
    assert set(head["mixture"]) == {"none", "soft", "top1"}
    assert set(head["adversarial"]["soft"]["small"]) == {"50", "100"}
    stolen = head["mixture"]["top1"]["same"]["100"]
    assert {"task_acc", "fidelity", "robust_fidelity", "noise_fidelity", "kl", "surrogate_robust_acc"} <= stolen.keys()
    assert {"transfer_asr", "random_sign_asr", "white_box_asr", "victim_acc_under_transfer"} <= stolen.keys()
    assert -1 <= stolen["d_fidelity"] <= 1
    assert (built.root / "artifacts/extract/jbda/expert-clean-rounded-2-seed-0.safetensors").is_file()
    jbda = json.loads((built.root / "metrics/extract-runs/jbda.json").read_text())["runs"]
    assert [(run["answers"], run["budget"], run.get("queries_used")) for run in jbda] == [
        ("none", 0, None),
        ("rounded-2", 40, 40),
    ]
    leaks = json.loads((built.root / "metrics/membership.json").read_text())
    assert set(leaks["adversarial"]) == {"loss", "calibrated", "LiRA"}
    assert set(leaks["mixture"]) == {"loss"}
    assert set(leaks["standard"]["loss"]) == {"clean", "adversarial"}


def test_numbers_are_complete_and_plausible(built: Project) -> None:
    head = json.loads((built.root / "metrics/evaluate.json").read_text())
    assert head["images"] == 40
    for name in ("mixture", "uniform-average", "before-joint", *(f"baseline/{name}" for name in BASELINES)):
        if head["verdict"].get(name) == "fail":  # networks that learned almost nothing may well be doubted
            assert head[name]["worst"] is None
        else:
            assert 0 <= head[name]["worst"] <= head[name]["pgd"] <= head[name]["clean"] <= 1
    judged = json.loads((built.root / "metrics/verdict.json").read_text())
    assert sorted(judged) == [*(f"baseline/{name}" for name in BASELINES), "mixture"]
    assert all(len(model["checks"]) == 10 for model in judged.values())
    mixture = json.loads((built.root / "metrics/evaluate/mixture.json").read_text())
    assert {"gate", "oracle_routing", "against", "per_class"} <= mixture.keys()
    assert {"gate-frozen", "misrouting", "experts", "transfer"} <= mixture["attacks"].keys()
    assert len(list((built.root / "metrics/evaluate").glob("*.json"))) == 3 + len(BASELINES) + 2 * len(EXPERTS)


def test_a_second_repro_does_nothing(built: Project) -> None:
    assert stages_run(built.dvc("repro")) == []
    assert "nothing to do" in built.advmoe("check")


def test_results_are_shown_and_questions_answered_without_touching_what_is_tracked(built: Project) -> None:
    assert "mixture" in built.advmoe("results")
    answer = built.advmoe("evaluate", "--attack", "pgd", "--limit", "20", "--steps", "2", "--no-checks")
    assert "runs/evaluate-" in answer
    assert built.run("git", "status", "--porcelain") == ""


def test_the_mixture_loads_as_a_module(built: Project) -> None:
    code = (
        "import torch, advmoe; model = advmoe.load_model('artifacts/train/mixture.safetensors');"
        "print(float(model(torch.rand(3, 1, 8, 8)).exp().sum()))"
    )
    assert float(built.run(sys.executable, "-c", code)) == pytest.approx(3, abs=1e-4)


def test_metrics_and_plots_are_known_to_dvc(built: Project) -> None:
    shown = built.dvc("metrics", "show", "--md")
    assert all(name in shown for name in ("worst", "verdict", "adversarial.clean", "poisoning", "train_tflops"))
    shown = built.dvc("plots", "show", "--out", "runs/plots")
    page = Path(shown.strip().splitlines()[-1].removeprefix("file://"))
    assert "vega" in page.read_text()


def test_equal_params_give_identical_files(built: Project) -> None:
    before, lock = contents(built), (built.root / "dvc.lock").read_text()
    for stage in (
        "prepare",
        "pretrain@pgd-1",
        "pretrain@fgsm-1",
        "baseline@standard",
        "baseline@equal-parameters",
        "baseline@uniform",
        "train",
        "evaluate",
        "poison@blended",
        "extract@jbda",
    ):
        built.dvc("repro", "--force", "--no-run-cache", "--single-item", stage)
    assert contents(built) == before
    assert (built.root / "dvc.lock").read_text() == lock


def flat(file: Path) -> list[str]:
    """The names of the numbers in a metrics file, as DVC shows them."""
    content = json.loads(file.read_text())
    nested = {key: value if isinstance(value, dict) else {"": value} for key, value in content.items()}
    return [f"{key}.{name}" if name else key for key, values in nested.items() for name in values]


def pending(project: Project) -> list[str]:
    """What `advmoe check` says that DVC would run."""
    return [each.strip() for each in project.advmoe("check").partition("dvc repro would run: ")[2].split(",")]


def test_a_docstring_reruns_nothing(built: Project) -> None:
    file = built.root / "advmoe/training/trainer.py"
    file.write_text(file.read_text().replace('"""', '"""Other words. ', 1) + "\n# a comment\n")
    assert pending(built) == ["code"]
    assert stages_run(built.dvc("repro")) == ["code"]
    assert stages_run(built.dvc("repro")) == []
    built.run("git", "checkout", "--", ".")


def test_a_line_of_a_poisoning_attack_reruns_poisoning_and_what_follows(built: Project) -> None:
    file = built.root / "advmoe/threats/poisoning/badnets.py"
    file.write_text(file.read_text() + "\n\nNEW = 1\n")
    assert sorted(pending(built)) == sorted(["code", *(f"poison@{name}" for name in POISON), "report"])
    built.run("git", "checkout", "--", ".")


def test_another_seed_of_an_expert_and_back_costs_nothing(built: Project) -> None:
    """DVC's run cache has the first run: no stage has an uncached output that is neither metric nor plot."""
    before = contents(built)
    built.params("experts.clean.seed", 77)
    assert "pretrain@clean" in stages_run(built.dvc("repro", "experts"))
    built.run("git", "checkout", "--", "params.yaml")
    said = built.dvc("repro", "experts")
    assert "Stage 'pretrain@clean' is cached - skipping run, checking out outputs" in said
    built.run("git", "checkout", "--", ".")
    assert contents(built) == before


def test_an_experts_own_params_rerun_it_and_what_follows(built: Project) -> None:
    built.params("experts.fgsm-2.seed", 12)
    said = built.advmoe("check").partition("dvc repro would run: ")[2].strip().split(", ")
    follow = ["experts", "baseline@uniform", "train", "evaluate", *THREATS, "report"]
    assert sorted(said) == sorted(["inputs", "pretrain@fgsm-2", *follow])
    built.run("git", "checkout", "--", "params.yaml")


def test_an_experiment_at_another_epsilon_reruns_exactly_what_meets_it(built: Project) -> None:
    ran = stages_run(built.dvc("exp", "run", "--name", "smaller", "--set-param", "epsilon=8/255"))
    meets = [f"baseline@{name}" for name in BASELINES if name != "standard"]
    derived = ["inputs", "experts"]  # the parameters of each stage, and which experts mixtures start from
    assert sorted(ran) == sorted([*derived, *PGD_EXPERTS, *meets, "train", "evaluate", *THREATS, "report"])
    assert "epsilon: 8/255 " in (built.root / "params.yaml").read_text()
    table = built.dvc("exp", "show", "--csv", "--no-pager")
    assert "smaller" in table
    numbers = [name for file in ("headline", "threats") for name in flat(built.root / f"metrics/{file}.json")]
    assert len(numbers) <= 15
    assert set(numbers) <= set(table.partition("\n")[0].strip().split(","))
    assert "metrics/" not in table.partition("\n")[0].replace("metrics/aggregate.json", "").partition("artifacts")[0]
