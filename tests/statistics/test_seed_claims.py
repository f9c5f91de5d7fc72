"""Claims about methods: tests over seeds against SciPy and by hand, and snapshots that are not replicates."""

import hashlib
import json
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from scipy import stats
from snapshot_files import IMAGES, Model, model_wrong_on, write_snapshot

from advmoe.core.errors import UserError
from advmoe.core.settings import read_yaml
from advmoe.core.snapshots import FolderSnapshot, GitSnapshot, Snapshot
from advmoe.core.stage_inputs import all_inputs, content_of, inputs_path
from advmoe.statistics import aggregation
from advmoe.statistics.aggregation import Aggregate, SeedClaimResult, aggregate
from advmoe.statistics.claims import Claim
from advmoe.statistics.seed_tests import mean_difference_test

MIXTURE, PLAIN, STANDARD = "mixture", "baseline/adversarial", "baseline/standard"
CLAIM = Claim(model=MIXTURE, over=PLAIN, under="worst")
SECOND = Claim(model=MIXTURE, over=STANDARD, under="worst")


def models(wrong: int, standard: int = 0) -> dict[str, Model]:
    """The mixture is always correct, the plain networks are wrong on that many images."""
    return {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(wrong)), STANDARD: model_wrong_on(range(standard))}


def seed_snapshots(root: Path, wrong: Sequence[int], **changes: Any) -> list[Snapshot]:
    """One snapshot per seed 0, 1, ...; in each the adversarial network is wrong on that many of 40 images."""
    return [
        FolderSnapshot(write_snapshot(root / f"run-{seed}", models(each), seed, **changes))
        for seed, each in enumerate(wrong)
    ]


def only(found: Aggregate) -> SeedClaimResult:
    """Returns the only claim of the only group."""
    ((finding,),) = (group.results for group in found.groups)
    return finding


def test_the_t_test_gives_values_computed_by_hand() -> None:
    """0.1, 0.2, 0.3: mean 0.2, sd 0.1, t = 0.2 / (0.1 / sqrt 3) = 3.4641 on 2 degrees, half-width 0.248414."""
    found = mean_difference_test([Fraction(1, 10), Fraction(2, 10), Fraction(3, 10)])
    assert found.test == "paired t-test"
    assert [found.mean, found.sd, found.low, found.high] == pytest.approx([0.2, 0.1, -0.048414, 0.448414], abs=1e-6)
    assert found.p == pytest.approx(0.074180, abs=1e-6)


def test_the_t_test_is_scipys_paired_one() -> None:
    first, second = [165, 168, 158, 162], [160, 170, 150, 158]
    found = mean_difference_test([Fraction(one - other, 200) for one, other in zip(first, second, strict=True)])
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)


@pytest.mark.parametrize(("count", "p"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_equal_differences_get_a_sign_test(count: int, p: float) -> None:
    found = mean_difference_test([Fraction(1, 200)] * count)
    assert (found.test, found.low, found.sd, found.p) == ("exact sign test", None, 0.0, p)
    assert mean_difference_test([Fraction(0)] * count).p == 1.0


def test_three_seeds_are_tested(tmp_path: Path) -> None:
    """5, 6 and 7 images of 40: differences 0.125, 0.15, 0.175; t = 0.15 / (0.025 / sqrt 3) = 10.3923, p = 0.009133."""
    found = only(aggregate(seed_snapshots(tmp_path, [5, 6, 7]), {"it": CLAIM}))
    assert found.test is not None
    assert found.status == "supported"
    assert [found.test.mean, found.test.sd] == pytest.approx([0.15, 0.025])
    assert found.adjusted_p == pytest.approx(0.009133, abs=2e-6)
    assert found.sentence == (
        "mean of 3 seeds: mixture 100.0 %, baseline/adversarial 85.0 %: difference +15.0 points [8.8, 21.2], sd 2.5, "
        "paired t-test, p = 0.0091, Holm 0.0091"
    )


def test_many_images_do_not_make_up_for_seeds_that_disagree(tmp_path: Path) -> None:
    """Each seed alone is significant (10 against 0 images), but one has the opposite sign."""
    snapshots = seed_snapshots(tmp_path, [10, 10, 0])
    write_snapshot(tmp_path / "run-2", {MIXTURE: model_wrong_on(range(10)), PLAIN: model_wrong_on([])}, 2)
    found = only(aggregate(snapshots, {"it": CLAIM}))
    assert found.status == "not supported"
    assert [replicate.evidence.paired.p < 0.01 for replicate in found.replicates] == [True] * 3


def test_a_method_can_be_contradicted(tmp_path: Path) -> None:
    claim = Claim(model=PLAIN, over=MIXTURE, under="worst")
    assert only(aggregate(seed_snapshots(tmp_path, [5, 6, 7]), {"it": claim})).status == "contradicted"


@pytest.mark.parametrize(("wrong", "more"), [([5, 6], "2"), ([5], "1,2")])
def test_fewer_than_three_seeds_are_not_judged_however_large_the_effect(
    tmp_path: Path, wrong: list[int], more: str
) -> None:
    found = only(aggregate(seed_snapshots(tmp_path, wrong), {"it": CLAIM}))
    assert (found.status, found.test, found.adjusted_p) == ("not judged", None, None)
    assert found.sentence.startswith(f"{len(wrong)} seed")
    assert f"`dvc exp run --queue -S 'seed={more}'`, `dvc queue start`, `advmoe aggregate`" in found.sentence
    assert len(found.replicates) == len(wrong)


def test_equal_differences_are_not_significant_by_themselves(tmp_path: Path) -> None:
    """4 images in each of three seeds: a naive t-test would divide by 0."""
    found = only(aggregate(seed_snapshots(tmp_path, [4, 4, 4]), {"it": CLAIM}))
    assert (found.status, found.adjusted_p) == ("not supported", 0.25)
    assert "every seed differs by +10.0 points, so there is no scatter for a t-test; exact sign test" in found.sentence
    found = only(aggregate(seed_snapshots(tmp_path, [4] * 6), {"it": CLAIM}))
    assert (found.status, found.adjusted_p) == ("supported", 0.03125)
    found = only(aggregate(seed_snapshots(tmp_path, [0] * 6), {"it": CLAIM}))
    assert (found.status, found.adjusted_p) == ("not supported", 1.0)
    assert "no seed differs" in found.sentence


def test_claims_of_a_group_are_one_family(tmp_path: Path) -> None:
    snapshots = seed_snapshots(tmp_path, [5, 6, 7])
    ((first, second),) = (group.results for group in aggregate(snapshots, {"a": CLAIM, "b": SECOND}).groups)
    assert first.test is not None
    assert first.adjusted_p == pytest.approx(2 * first.test.p, abs=1e-6)
    assert second.adjusted_p == 1.0


def test_a_seed_counts_once(tmp_path: Path) -> None:
    snapshots = [
        *seed_snapshots(tmp_path, [5, 6]),
        FolderSnapshot(write_snapshot(tmp_path / "again", models(7), seed=1)),
    ]
    found = aggregate(snapshots, {"it": CLAIM})
    assert only(found).status == "not judged"
    assert [excluded.as_dict() for excluded in found.excluded] == [
        {"record": str(tmp_path / "again"), "reason": f"seed 1 is counted already, from {tmp_path / 'run-1'}"}
    ]


def test_snapshots_with_other_params_are_not_replicates(tmp_path: Path) -> None:
    wide = seed_snapshots(tmp_path / "wide", [5, 6], model={"kind": "resnet18", "width": 4})
    found = aggregate([*wide, *seed_snapshots(tmp_path, [5, 6, 7])], {"it": CLAIM})
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1, 2], [0, 1]]
    assert [dict(group.differs) for group in found.groups] == [{"model.width": 2}, {"model.width": 4}]
    assert [group.results[0].status for group in found.groups] == ["supported", "not judged"]
    assert found.groups[1].title == "seeds 0, 1, model.width = 4"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"prepare": {"source": {"kind": "npz"}}}, "their data sets differ .'prepare'"),
        ({"epsilon": 0.2}, "their threat models differ .'epsilon'"),
    ],
)
def test_snapshots_with_another_setup_are_refused_when_named(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    snapshots = [*seed_snapshots(tmp_path, [5, 6]), *seed_snapshots(tmp_path / "other", [5], **change)]
    with pytest.raises(UserError, match=rf"other/run-0 and .*run-0 cannot be aggregated: {key}"):
        aggregate(snapshots, {"it": CLAIM})
    assert [len(group.runs) for group in aggregate(snapshots, {"it": CLAIM}, require_same_setup=False).groups] == [2, 1]


def test_launcher_and_notation_of_epsilon_do_not_matter(tmp_path: Path) -> None:
    snapshots = [
        *seed_snapshots(tmp_path, [5], epsilon="8/255"),
        FolderSnapshot(write_snapshot(tmp_path / "nice", models(6), 1, epsilon=8 / 255, launcher="nice python")),
    ]
    for snapshot in snapshots:  # the reports hold the number
        for file in Path(snapshot.name).glob("metrics/evaluate/*.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"epsilon": 8 / 255}))
    assert [len(group.runs) for group in aggregate(snapshots, {"it": CLAIM}).groups] == [2]


def test_a_snapshot_without_results_is_named(tmp_path: Path) -> None:
    snapshots = seed_snapshots(tmp_path, [5, 6, 7, 8, 9, 9, 9])
    (tmp_path / "run-1/metrics/decisions/mixture.csv").unlink()
    (tmp_path / "run-2/params.yaml").unlink()
    (tmp_path / "run-3/metrics/evaluate/mixture.json").write_text("{")
    (tmp_path / "run-6/params.yaml").write_text("seed: many\nepsilon: 0.1\n")
    found = aggregate(snapshots, {"it": CLAIM})
    assert only(found).status == "supported"
    reasons = {Path(excluded.snapshot_name).name: excluded.reason for excluded in found.excluded}
    assert reasons["run-1"] == "has no metrics/decisions/mixture.csv"
    assert reasons["run-2"] == "has no params.yaml"
    assert "cannot be read as JSON" in reasons["run-3"]
    assert "seed: " in reasons["run-6"]
    assert [run.seed for run in found.groups[0].runs] == [0, 4, 5]


def test_a_snapshot_without_results_does_not_replace_one_with_results(tmp_path: Path) -> None:
    first, second = (FolderSnapshot(write_snapshot(tmp_path / name, models(5))) for name in ("a", "b"))
    (tmp_path / "a/metrics/decisions/mixture.csv").unlink()
    found = aggregate([first, second], {"it": CLAIM})
    assert [run.snapshot.name for run in found.groups[0].runs] == [str(tmp_path / "b")]


def test_a_claim_without_evidence_at_one_seed_is_tested_on_the_others(tmp_path: Path) -> None:
    snapshots = seed_snapshots(tmp_path, [5, 6, 7, 8])
    (tmp_path / "run-3/metrics/decisions/baseline-standard.csv").unlink()
    (group,) = aggregate(snapshots, {"a": CLAIM, "b": SECOND}).groups
    assert [len(finding.replicates) for finding in group.results] == [4, 3]
    (excluded,) = group.results[1].excluded
    assert "has no metrics/decisions/baseline-standard.csv" in excluded.reason


def test_a_failed_check_at_one_seed_withholds_the_claim(tmp_path: Path) -> None:
    """Testing the others only would be a selection of seeds."""
    snapshots = seed_snapshots(tmp_path, [5, 6, 7, 8])
    failed = models(5)
    failed[MIXTURE].verdict, failed[MIXTURE].withheld = "fail", ["gradients: all 0"]
    write_snapshot(tmp_path / "run-2", failed, 2)
    found = only(aggregate(snapshots, {"it": CLAIM}))
    assert (found.status, found.replicates, found.test) == ("withheld", (), None)
    assert found.sentence == "a check failed at seed 2: mixture: gradients: all 0"


@pytest.mark.parametrize("change", [{"seed": 7}, {"epsilon": 0.2}])
def test_results_of_another_seed_or_epsilon_than_params_are_excluded(tmp_path: Path, change: dict[str, Any]) -> None:
    (snapshot,) = seed_snapshots(tmp_path, [5])
    kept = {file: file.read_bytes() for file in tmp_path.glob("run-0/metrics/**/*.*")}
    write_snapshot(tmp_path / "run-0", models(5), **({"seed": 0} | change))
    for file, content in kept.items():
        file.write_bytes(content)
    (excluded,) = aggregate([snapshot], {"it": CLAIM}).excluded
    assert excluded.reason == "results on mixture were computed with another seed or epsilon than params.yaml has"


LOCK = """
stages:
  train: {params: {params.yaml: {seed: 0, model: {kind: resnet18, width: %s}}}}
  poison@badnets: {params: {params.yaml: {seed: 99}}}
  pretrain@gone: {params: {params.yaml: {experts.gone: {seed: 3}}}}
  evaluate: {params: {params.yaml: {epsilon: 0.1}}}
"""


def test_params_edited_after_the_run_are_an_error(tmp_path: Path) -> None:
    (snapshot,) = seed_snapshots(tmp_path, [5])
    (tmp_path / "run-0/dvc.lock").write_text(LOCK % 2)
    assert aggregate([snapshot], {"it": CLAIM}).excluded == ()
    (tmp_path / "run-0/dvc.lock").write_text(LOCK % 16)
    (excluded,) = aggregate([snapshot], {"it": CLAIM}).excluded
    assert excluded.reason == "train ran with another 'model' than params.yaml has; run `dvc repro`"
    (tmp_path / "run-0/dvc.lock").write_text("stages: [")
    assert aggregate([snapshot], {"it": CLAIM}).excluded[0].reason == "dvc.lock cannot be read"


def md5_of(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def test_the_hash_of_the_parameters_of_a_stage_is_compared(tmp_path: Path) -> None:
    (snapshot,) = seed_snapshots(tmp_path, [5])
    params = {"adversaries": {"pgd": {"kind": "pgd"}}, **read_yaml(ROOT / "params.yaml"), "seed": 0, "epsilon": 0.1}
    file = tmp_path / "run-0/params.yaml"
    file.write_text(json.dumps(params))
    path = inputs_path("train")
    lock = {"stages": {"train": {"deps": [{"path": str(path), "md5": md5_of(content_of(all_inputs(params)[path]))}]}}}
    (tmp_path / "run-0/dvc.lock").write_text(json.dumps(lock))
    assert aggregate([snapshot], {"it": CLAIM}).excluded == ()
    file.write_text(json.dumps(params | {"train": params["train"] | {"gate_lr": 7.0}}))
    (excluded,) = aggregate([snapshot], {"it": CLAIM}).excluded
    assert excluded.reason == "train ran with other parameters than params.yaml has; run `dvc repro`"
    file.write_text(json.dumps({"seed": 0, "epsilon": 0.1}))
    assert "not one of this version" in aggregate([snapshot], {"it": CLAIM}).excluded[0].reason


def test_a_lock_of_an_earlier_version_agrees_with_its_params_in_todays_form(tmp_path: Path) -> None:
    (snapshot,) = seed_snapshots(tmp_path, [5])
    entry = {"seed": 5, "reads": "epsilon", "adversary": {"kind": "pgd", "steps": [5], "step_size": 0.25}}
    params = {"seed": 0, "epsilon": 0.1, "experts": {"pgd-1": entry}}
    (tmp_path / "run-0/params.yaml").write_text(json.dumps(params))
    locked = {"params": {"params.yaml": {"seed": 0, "experts.pgd-1": entry}}}
    lock: dict[str, Any] = {"stages": {"pretrain@pgd-1": locked}}
    (tmp_path / "run-0/dvc.lock").write_text(json.dumps(lock))
    assert aggregate([snapshot], {"it": CLAIM}).excluded == ()
    lock["stages"]["pretrain@pgd-1"]["params"]["params.yaml"]["experts.pgd-1"] = entry | {"seed": 6}
    (tmp_path / "run-0/dvc.lock").write_text(json.dumps(lock))
    assert "another 'experts.pgd-1'" in aggregate([snapshot], {"it": CLAIM}).excluded[0].reason


def git(*arguments: str) -> str:
    """Runs git in the current folder with a neutral identity."""
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_experiments_and_the_workspace_are_found_and_can_be_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    git("commit", "--quiet", "--allow-empty", "--message", "empty")
    start, made = git("rev-parse", "HEAD"), {}
    for seed, wrong in ((1, 6), (2, 7)):
        write_snapshot(Path(), models(wrong), seed)
        git("add", "--all")
        git("commit", "--quiet", "--message", "an experiment")
        made[f"seed-{seed}"] = git("rev-parse", "HEAD")
        git("update-ref", f"refs/exps/ab/{'0' * 38}/seed-{seed}", "HEAD")
        git("reset", "--quiet", "--hard", start)
    write_snapshot(Path(), models(5), 0)
    found = aggregate(aggregation.available_snapshots(), {"it": CLAIM}, require_same_setup=False)
    aggregation.write(found, Path("metrics/aggregate.json"))
    written = json.loads(Path("metrics/aggregate.json").read_text())
    assert written == found.as_dict()
    (group,) = written["groups"]
    each = group["claims"]["it"]["seeds"]
    assert [(one["record"], one["commit"], one["seed"]) for one in each] == [
        ("seed-1", made["seed-1"], 1),
        ("seed-2", made["seed-2"], 2),
        ("workspace", None, 0),
    ]
    for one in each[:2]:  # from the hash alone, the same numbers
        again = only(aggregate([GitSnapshot(one["commit"])], {"it": CLAIM})).replicates[0].as_dict()
        assert again | {"record": one["record"]} == one
    differences = [one["model"]["accuracy"] - one["over"]["accuracy"] for one in each]
    assert group["claims"]["it"]["test"]["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=1e-6)
    assert written["schema_version"] == 1


def test_an_aggregate_is_shown_with_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots = [*seed_snapshots(tmp_path, [5, 6, 7]), FolderSnapshot(tmp_path / "nothing")]
    aggregation.show(aggregate(snapshots, {"it": CLAIM}))
    said = capsys.readouterr()
    assert "seeds 0, 1, 2" in said.out
    assert "supported" in said.out
    assert f"{tmp_path / 'nothing'} is excluded: has no params.yaml" in said.err


def test_without_snapshots_there_is_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    found = aggregate([], {"it": CLAIM})
    assert found.as_dict()["groups"] == []
    aggregation.show(found)
    assert "no snapshot holds results" in capsys.readouterr().out


def test_accuracies_of_every_seed_are_written(tmp_path: Path) -> None:
    (one,) = aggregate(seed_snapshots(tmp_path, [5]), {"it": CLAIM}).as_dict()["groups"][0]["claims"]["it"]["seeds"]
    assert (one["model"]["correct"], one["over"]["correct"], one["over"]["total"]) == (IMAGES, IMAGES - 5, IMAGES)
    assert one["difference"] == 0.125
