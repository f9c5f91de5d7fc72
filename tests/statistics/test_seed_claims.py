"""Claims about methods: tests over seeds against scipy and by hand, and records that do not belong together."""

import json
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from planted import IMAGES, Model, plain, plant
from scipy import stats

from advmoe.core.errors import UserError
from advmoe.core.snapshots import Folder, Revision, Snapshot
from advmoe.statistics import aggregation
from advmoe.statistics.aggregation import Aggregate, SeedClaimResult, aggregate
from advmoe.statistics.claims import Claim
from advmoe.statistics.seed_tests import over_seeds

MIXTURE, PLAIN, STANDARD = "mixture", "baseline/adversarial", "baseline/standard"
CLAIM = Claim(model=MIXTURE, over=PLAIN, under="worst")
SECOND = Claim(model=MIXTURE, over=STANDARD, under="worst")


def models(wrong: int, standard: int = 0) -> dict[str, Model]:
    """The mixture always right, the plain networks wrong on so many images."""
    return {MIXTURE: plain([]), PLAIN: plain(range(wrong)), STANDARD: plain(range(standard))}


def planted(root: Path, wrong: Sequence[int], **changes: Any) -> list[Snapshot]:
    """A record per seed 0, 1, ..; in each the adversarial network is wrong on so many of 40 images."""
    return [Folder(plant(root / f"run-{seed}", models(each), seed, **changes)) for seed, each in enumerate(wrong)]


def only(found: Aggregate) -> SeedClaimResult:
    """The one finding of the one group."""
    ((finding,),) = (group.findings for group in found.groups)
    return finding


def test_the_t_test_is_what_the_hand_computes() -> None:
    """0.1, 0.2, 0.3: mean 0.2, sd 0.1, t = 0.2 / (0.1 / sqrt 3) = 3.4641 on 2 degrees, half-width 0.248414."""
    found = over_seeds([Fraction(1, 10), Fraction(2, 10), Fraction(3, 10)])
    assert found.test == "paired t-test"
    assert [found.mean, found.sd, found.low, found.high] == pytest.approx([0.2, 0.1, -0.048414, 0.448414], abs=1e-6)
    assert found.p == pytest.approx(0.074180, abs=1e-6)


def test_the_t_test_is_scipys_paired_one() -> None:
    first, second = [165, 168, 158, 162], [160, 170, 150, 158]
    found = over_seeds([Fraction(one - other, 200) for one, other in zip(first, second, strict=True)])
    assert found.p == pytest.approx(stats.ttest_rel(first, second).pvalue)


@pytest.mark.parametrize(("count", "p"), [(3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_seeds_that_do_not_scatter_get_a_sign_test(count: int, p: float) -> None:
    found = over_seeds([Fraction(1, 200)] * count)
    assert (found.test, found.low, found.sd, found.p) == ("exact sign test", None, 0.0, p)
    assert over_seeds([Fraction(0)] * count).p == 1.0


def test_three_seeds_are_judged(tmp_path: Path) -> None:
    """5, 6 and 7 images of 40: differences 0.125, 0.15, 0.175; t = 0.15 / (0.025 / sqrt 3) = 10.3923, p = 0.009133."""
    found = only(aggregate(planted(tmp_path, [5, 6, 7]), {"it": CLAIM}))
    assert found.tested is not None
    assert found.status == "supported"
    assert [found.tested.mean, found.tested.sd] == pytest.approx([0.15, 0.025])
    assert found.holm == pytest.approx(0.009133, abs=2e-6)
    assert found.sentence == (
        "mean of 3 seeds: mixture 100.0 %, baseline/adversarial 85.0 %: difference +15.0 points [8.8, 21.2], sd 2.5, "
        "paired t-test, p = 0.0091, Holm 0.0091"
    )


def test_many_images_do_not_make_up_for_seeds_that_disagree(tmp_path: Path) -> None:
    """Each seed alone is sure of its checkpoints (10 against 0 images), but one the other way round."""
    records = planted(tmp_path, [10, 10, 0])
    plant(tmp_path / "run-2", {MIXTURE: plain(range(10)), PLAIN: plain([])}, 2)
    found = only(aggregate(records, {"it": CLAIM}))
    assert found.status == "not supported"
    assert [replicate.evidence.paired.p < 0.01 for replicate in found.replicates] == [True] * 3


def test_a_method_can_be_contradicted(tmp_path: Path) -> None:
    claim = Claim(model=PLAIN, over=MIXTURE, under="worst")
    assert only(aggregate(planted(tmp_path, [5, 6, 7]), {"it": claim})).status == "contradicted"


@pytest.mark.parametrize(("wrong", "more"), [([5, 6], "2"), ([5], "1,2")])
def test_fewer_than_three_seeds_are_not_judged_however_large_the_effect(
    tmp_path: Path, wrong: list[int], more: str
) -> None:
    found = only(aggregate(planted(tmp_path, wrong), {"it": CLAIM}))
    assert (found.status, found.tested, found.holm) == ("not judged", None, None)
    assert found.sentence.startswith(f"{len(wrong)} seed")
    assert f"`dvc exp run --queue -S 'seed={more}'`, `dvc queue start`, `advmoe aggregate`" in found.sentence
    assert len(found.replicates) == len(wrong)


def test_equal_differences_are_no_certainty(tmp_path: Path) -> None:
    """4 images in each of three seeds: a naive t-test would divide by 0 and call it certain."""
    found = only(aggregate(planted(tmp_path, [4, 4, 4]), {"it": CLAIM}))
    assert (found.status, found.holm) == ("not supported", 0.25)
    assert "every seed differs by +10.0 points, so there is no scatter for a t-test; exact sign test" in found.sentence
    found = only(aggregate(planted(tmp_path, [4] * 6), {"it": CLAIM}))
    assert (found.status, found.holm) == ("supported", 0.03125)
    found = only(aggregate(planted(tmp_path, [0] * 6), {"it": CLAIM}))
    assert (found.status, found.holm) == ("not supported", 1.0)
    assert "no seed differs" in found.sentence


def test_claims_of_a_group_are_one_family(tmp_path: Path) -> None:
    records = planted(tmp_path, [5, 6, 7])
    ((first, second),) = (group.findings for group in aggregate(records, {"a": CLAIM, "b": SECOND}).groups)
    assert first.tested is not None
    assert first.holm == pytest.approx(2 * first.tested.p, abs=1e-6)
    assert second.holm == 1.0


def test_a_seed_counts_once(tmp_path: Path) -> None:
    records = [*planted(tmp_path, [5, 6]), Folder(plant(tmp_path / "again", models(7), seed=1))]
    found = aggregate(records, {"it": CLAIM})
    assert only(found).status == "not judged"
    assert [left.as_dict() for left in found.left] == [
        {"record": str(tmp_path / "again"), "reason": f"seed 1 is counted already, from {tmp_path / 'run-1'}"}
    ]


def test_records_of_other_params_are_no_replicates(tmp_path: Path) -> None:
    wide = planted(tmp_path / "wide", [5, 6], model={"kind": "resnet18", "width": 4})
    found = aggregate([*wide, *planted(tmp_path, [5, 6, 7])], {"it": CLAIM})
    assert [[run.seed for run in group.runs] for group in found.groups] == [[0, 1, 2], [0, 1]]
    assert [dict(group.differs) for group in found.groups] == [{"model.width": 2}, {"model.width": 4}]
    assert [group.findings[0].status for group in found.groups] == ["supported", "not judged"]
    assert found.groups[1].title == "seeds 0, 1, model.width = 4"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"prepare": {"source": {"kind": "npz"}}}, "'prepare'.*other data"),
        ({"epsilon": 0.2}, "'epsilon'.*threat model"),
    ],
)
def test_records_about_another_question_are_refused_when_named(
    tmp_path: Path, change: dict[str, Any], key: str
) -> None:
    records = [*planted(tmp_path, [5, 6]), *planted(tmp_path / "other", [5], **change)]
    with pytest.raises(UserError, match=rf"other/run-0 and .*run-0 cannot be aggregated: {key}"):
        aggregate(records, {"it": CLAIM})
    assert [len(group.runs) for group in aggregate(records, {"it": CLAIM}, chosen=False).groups] == [2, 1]


def test_how_a_run_was_started_and_how_epsilon_is_written_do_not_matter(tmp_path: Path) -> None:
    records = [
        *planted(tmp_path, [5], epsilon="8/255"),
        Folder(plant(tmp_path / "nice", models(6), 1, epsilon=8 / 255, launcher="nice python")),
    ]
    for record in records:  # the reports hold the number
        for file in Path(record.name).glob("metrics/evaluate/*.json"):
            file.write_text(json.dumps(json.loads(file.read_text()) | {"epsilon": 8 / 255}))
    assert [len(group.runs) for group in aggregate(records, {"it": CLAIM}).groups] == [2]


def test_a_record_without_results_is_named(tmp_path: Path) -> None:
    records = planted(tmp_path, [5, 6, 7, 8, 9, 9, 9])
    (tmp_path / "run-1/metrics/decisions/mixture.csv").unlink()
    (tmp_path / "run-2/params.yaml").unlink()
    (tmp_path / "run-3/metrics/evaluate/mixture.json").write_text("{")
    (tmp_path / "run-6/params.yaml").write_text("seed: many\nepsilon: 0.1\n")
    found = aggregate(records, {"it": CLAIM})
    assert only(found).status == "supported"
    reasons = {Path(left.record).name: left.reason for left in found.left}
    assert reasons["run-1"] == "has no metrics/decisions/mixture.csv"
    assert reasons["run-2"] == "has no params.yaml"
    assert "cannot be read as JSON" in reasons["run-3"]
    assert "seed: " in reasons["run-6"]
    assert [run.seed for run in found.groups[0].runs] == [0, 4, 5]


def test_a_record_without_results_does_not_take_the_place_of_one_that_has_them(tmp_path: Path) -> None:
    first, second = (Folder(plant(tmp_path / name, models(5))) for name in ("a", "b"))
    (tmp_path / "a/metrics/decisions/mixture.csv").unlink()
    found = aggregate([first, second], {"it": CLAIM})
    assert [run.record.name for run in found.groups[0].runs] == [str(tmp_path / "b")]


def test_a_claim_that_one_seed_cannot_answer_is_judged_from_the_others(tmp_path: Path) -> None:
    records = planted(tmp_path, [5, 6, 7, 8])
    (tmp_path / "run-3/metrics/decisions/baseline-standard.csv").unlink()
    (group,) = aggregate(records, {"a": CLAIM, "b": SECOND}).groups
    assert [len(finding.replicates) for finding in group.findings] == [4, 3]
    (left,) = group.findings[1].left
    assert "has no metrics/decisions/baseline-standard.csv" in left.reason


def test_a_failed_check_at_one_seed_withholds_the_claim(tmp_path: Path) -> None:
    """To judge from the others would be to choose seeds."""
    records = planted(tmp_path, [5, 6, 7, 8])
    failed = models(5)
    failed[MIXTURE].verdict, failed[MIXTURE].withheld = "fail", ["gradients: all 0"]
    plant(tmp_path / "run-2", failed, 2)
    found = only(aggregate(records, {"it": CLAIM}))
    assert (found.status, found.replicates, found.tested) == ("withheld", (), None)
    assert found.sentence == "a check failed at seed 2: mixture: gradients: all 0"


@pytest.mark.parametrize("change", [{"seed": 7}, {"epsilon": 0.2}])
def test_results_of_other_params_than_the_record_states_do_not_count(tmp_path: Path, change: dict[str, Any]) -> None:
    (record,) = planted(tmp_path, [5])
    kept = {file: file.read_bytes() for file in tmp_path.glob("run-0/metrics/**/*.*")}
    plant(tmp_path / "run-0", models(5), **({"seed": 0} | change))
    for file, content in kept.items():
        file.write_bytes(content)
    (left,) = aggregate([record], {"it": CLAIM}).left
    assert left.reason == "results on mixture are not of the seed and epsilon in params.yaml"


LOCK = """
stages:
  train: {params: {params.yaml: {seed: 0, model: {kind: resnet18, width: %s}}}}
  poison@badnets: {params: {params.yaml: {seed: 99}}}
  pretrain@gone: {params: {params.yaml: {experts.gone: {seed: 3}}}}
  evaluate: {params: {params.yaml: {epsilon: 0.1}}}
"""


def test_params_edited_after_the_run_are_noticed(tmp_path: Path) -> None:
    (record,) = planted(tmp_path, [5])
    (tmp_path / "run-0/dvc.lock").write_text(LOCK % 2)
    assert aggregate([record], {"it": CLAIM}).left == ()
    (tmp_path / "run-0/dvc.lock").write_text(LOCK % 16)
    (left,) = aggregate([record], {"it": CLAIM}).left
    assert left.reason == "train ran with another 'model' than params.yaml has; run `dvc repro`"
    (tmp_path / "run-0/dvc.lock").write_text("stages: [")
    assert aggregate([record], {"it": CLAIM}).left[0].reason == "dvc.lock cannot be read"


def git(*arguments: str) -> str:
    """Run git in the current folder, as nobody in particular."""
    who = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def test_experiments_and_the_workspace_are_found_and_can_be_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    git("commit", "--quiet", "--allow-empty", "--message", "empty")
    start, made = git("rev-parse", "HEAD"), {}
    for seed, wrong in ((1, 6), (2, 7)):
        plant(Path(), models(wrong), seed)
        git("add", "--all")
        git("commit", "--quiet", "--message", "an experiment")
        made[f"seed-{seed}"] = git("rev-parse", "HEAD")
        git("update-ref", f"refs/exps/ab/{'0' * 38}/seed-{seed}", "HEAD")
        git("reset", "--quiet", "--hard", start)
    plant(Path(), models(5), 0)
    found = aggregate(aggregation.available(), {"it": CLAIM}, chosen=False)
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
        again = only(aggregate([Revision(one["commit"])], {"it": CLAIM})).replicates[0].as_dict()
        assert again | {"record": one["record"]} == one
    differences = [one["model"]["accuracy"] - one["over"]["accuracy"] for one in each]
    assert group["claims"]["it"]["test"]["p"] == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=1e-6)
    assert written["schema_version"] == 1


def test_an_aggregate_is_shown_with_what_was_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [*planted(tmp_path, [5, 6, 7]), Folder(tmp_path / "nothing")]
    aggregation.show(aggregate(records, {"it": CLAIM}))
    said = capsys.readouterr()
    assert "seeds 0, 1, 2" in said.out
    assert "supported" in said.out
    assert f"{tmp_path / 'nothing'} is left out: has no params.yaml" in said.err


def test_without_records_there_is_nothing_to_say(capsys: pytest.CaptureFixture[str]) -> None:
    found = aggregate([], {"it": CLAIM})
    assert found.as_dict()["groups"] == []
    aggregation.show(found)
    assert "no record holds results" in capsys.readouterr().out


def test_accuracies_of_every_seed_are_written(tmp_path: Path) -> None:
    (one,) = aggregate(planted(tmp_path, [5]), {"it": CLAIM}).as_dict()["groups"][0]["claims"]["it"]["seeds"]
    assert (one["model"]["correct"], one["over"]["correct"], one["over"]["total"]) == (IMAGES, IMAGES - 5, IMAGES)
    assert one["difference"] == 0.125
