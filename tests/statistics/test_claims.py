"""Claims about checkpoints: values computed by hand, and all cases in which a claim must not be tested."""

import json
from pathlib import Path

import pytest
from snapshot_files import IMAGES, Model, model_wrong_on, write_snapshot, wrong_on

from advmoe.core.errors import UserError
from advmoe.core.settings import validate
from advmoe.core.snapshots import FolderSnapshot
from advmoe.evaluation import summary
from advmoe.statistics import claims, evaluation_files
from advmoe.statistics.claims import Claim, ClaimResult, ClaimResults, evaluate_claims, holm_correction

HOLM = [  # p-values and their Holm-adjusted values, computed by hand
    ([], []),
    ([0.03], [0.03]),
    ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),
    ([0.01, 0.011, 0.012], [0.03, 0.03, 0.03]),  # 0.03, 0.022, 0.012: never smaller than the one before
    ([0.5, 0.9, 0.001], [1.0, 1.0, 0.003]),  # capped at 1
    ([0.02, 0.02], [0.04, 0.04]),
]
MIXTURE, PLAIN, EXPERT = "mixture", "baseline/adversarial", "expert/clean"


def one(folder: Path, under: str = "worst", model: str = MIXTURE, over: str = PLAIN) -> ClaimResult:
    """Tests a single claim."""
    return evaluate_claims(FolderSnapshot(folder), {"it": Claim(model=model, over=over, under=under)}, seed=0).results[
        0
    ]


@pytest.mark.parametrize(("p_values", "adjusted"), HOLM)
def test_holm_gives_values_computed_by_hand(p_values: list[float], adjusted: list[float]) -> None:
    assert holm_correction(p_values) == pytest.approx(adjusted)
    assert holm_correction(p_values[::-1]) == pytest.approx(adjusted[::-1])


def test_a_significant_difference_supports_the_claim(tmp_path: Path) -> None:
    """8 images against none: exact McNemar p = 2 / 2**8 = 0.0078125."""
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(8))})
    found = one(tmp_path)
    assert found.status == "supported"
    assert found.evidence is not None
    assert (found.evidence.model.correct, found.evidence.over.correct) == (IMAGES, IMAGES - 8)
    paired = found.evidence.paired
    assert (paired.difference, paired.only_first, paired.only_second, paired.p) == (0.2, 8, 0, 0.007812)
    assert found.adjusted_p == 0.007812
    assert found.sentence == (
        "mixture 100.0 % [91.2, 100.0], baseline/adversarial 80.0 % [65.2, 89.5]: difference +20.0 points "
        f"[{100 * paired.low:.1f}, {100 * paired.high:.1f}], 8 images against 0, p = 0.0078, Holm 0.0078"
    )


def test_the_opposite_of_a_claim_contradicts_it(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on(range(8)), PLAIN: model_wrong_on([])})
    assert one(tmp_path).status == "contradicted"
    assert "difference -20.0 points" in one(tmp_path).sentence


@pytest.mark.parametrize("wrong", [range(5), ()])
def test_too_few_images_and_none_at_all_do_not_support_it(tmp_path: Path, wrong: list[int]) -> None:
    """5 images against none: p = 2 / 32 = 0.0625."""
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(wrong)})
    found = one(tmp_path)
    assert (found.status, found.adjusted_p) == ("not supported", 0.0625 if wrong else 1.0)


def test_a_second_claim_raises_the_adjusted_p_value(tmp_path: Path) -> None:
    """6 images against none, p = 0.03125: enough alone, not with a second claim; an untested claim does not count."""
    write_snapshot(
        tmp_path,
        {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(6)), "baseline/standard": model_wrong_on([0])},
    )
    alone = Claim(model=MIXTURE, over=PLAIN, under="worst")
    missing = Claim(model=MIXTURE, over="baseline/lost", under="worst")
    found = evaluate_claims(FolderSnapshot(tmp_path), {"a": alone, "b": missing}, seed=0)
    assert [(each.status, each.adjusted_p) for each in found.results] == [("supported", 0.03125), ("not judged", None)]
    second = Claim(model=MIXTURE, over="baseline/standard", under="worst")
    found = evaluate_claims(FolderSnapshot(tmp_path), {"a": alone, "b": second}, seed=0)
    assert [(each.status, each.adjusted_p) for each in found.results] == [
        ("not supported", 0.0625),
        ("not supported", 1.0),
    ]


def test_claims_can_be_about_clean_images_and_single_attacks(tmp_path: Path) -> None:
    better = Model({"clean": wrong_on(0), "pgd": wrong_on(0), "fgsm": wrong_on(0)})
    worse = Model({"clean": wrong_on(*range(10)), "pgd": wrong_on(*range(10)), "fgsm": wrong_on(*range(20))})
    write_snapshot(tmp_path, {MIXTURE: better, PLAIN: worse})
    found = [one(tmp_path, under).evidence for under in ("clean", "pgd", "fgsm", "worst")]
    assert [each.paired.only_first for each in found if each] == [9, 9, 19, 19]


def test_an_attack_that_was_run_on_one_model_only_is_not_judged(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([], attack="misrouting"), PLAIN: model_wrong_on([])})
    assert one(tmp_path, "misrouting").sentence == "baseline/adversarial was not attacked by misrouting"


@pytest.mark.parametrize("model", [MIXTURE, PLAIN])
def test_a_failed_check_withholds_the_claim(tmp_path: Path, model: str) -> None:
    models = {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))}
    models[model].verdict, models[model].withheld = "fail", ["gradients: all of them are 0"]
    write_snapshot(tmp_path, models)
    for under in ("worst", "clean"):
        found = one(tmp_path, under)
        assert (found.status, found.evidence, found.adjusted_p) == ("withheld", None, None)
        assert found.sentence == f"{model}: gradients: all of them are 0"


def test_a_failure_in_the_verdicts_counts_whatever_the_report_says(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))})
    (tmp_path / "metrics/verdict.json").write_text(json.dumps({MIXTURE: {"verdict": "fail"}}))
    assert one(tmp_path).sentence == "mixture: a check failed, see metrics/verdict.json"


def test_checked_models_are_compared_in_their_own_worst_case(tmp_path: Path) -> None:
    """A gate-aware attack counts against the mixture, although it cannot be run on the plain network."""
    gated = Model({"clean": wrong_on(), "pgd": wrong_on(), "misrouting": wrong_on(*range(10))})
    write_snapshot(tmp_path, {MIXTURE: gated, PLAIN: model_wrong_on([])})
    found = one(tmp_path)
    assert found.status == "contradicted"
    assert found.sentence.endswith("; each in the worst case over all attacks run on it")


def test_a_model_without_a_verdict_is_compared_over_common_attacks(tmp_path: Path) -> None:
    gated = Model({"clean": wrong_on(), "pgd": wrong_on(0), "apgd": wrong_on(1), "misrouting": wrong_on(*range(20))})
    expert = Model({"clean": wrong_on(2), "pgd": wrong_on(3), "apgd": wrong_on(4)}, verdict="not asked")
    write_snapshot(tmp_path, {MIXTURE: gated, EXPERT: expert})
    found = one(tmp_path, over=EXPERT)
    assert found.evidence is not None
    assert (found.evidence.model.correct, found.evidence.over.correct) == (IMAGES - 2, IMAGES - 3)
    assert found.evidence.note.startswith("over the attacks run on both (pgd, apgd), as not all attacks were run on")


def test_without_an_attack_in_common_there_is_no_worst_case(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([], attack="fgsm"), EXPERT: model_wrong_on([], "not asked")})
    assert "have no attack in common" in one(tmp_path, over=EXPERT).sentence
    assert one(tmp_path, "clean", over=EXPERT).status == "not supported"


def test_images_that_were_not_attacked_are_left_out(tmp_path: Path) -> None:
    first, second = model_wrong_on([0]), model_wrong_on([1, 2])
    first.cells["rays"] = [*wrong_on(0, count=10), *[""] * (IMAGES - 10)]
    second.cells["rays"] = [*wrong_on(1, 2, count=8), *[""] * (IMAGES - 8)]
    write_snapshot(tmp_path, {MIXTURE: first, PLAIN: second})
    found = one(tmp_path, "rays")
    assert found.evidence is not None
    assert (found.evidence.model.correct, found.evidence.over.correct, found.evidence.over.total) == (7, 6, 8)


def test_no_image_in_common_is_no_evidence(tmp_path: Path) -> None:
    first, second = model_wrong_on([]), model_wrong_on([])
    first.cells["rays"] = [1, *[""] * (IMAGES - 1)]
    second.cells["rays"] = ["", 1, *[""] * (IMAGES - 2)]
    write_snapshot(tmp_path, {MIXTURE: first, PLAIN: second})
    assert one(tmp_path, "rays").sentence == "no image was attacked by rays on both models"


def test_skipping_images_after_a_successful_attack_is_noted(tmp_path: Path) -> None:
    first = model_wrong_on([])
    first.drop_fallen = True
    write_snapshot(tmp_path, {MIXTURE: first, PLAIN: model_wrong_on([])})
    sentence = one(tmp_path, "pgd").sentence
    assert sentence.endswith("; an image misclassified under an earlier attack counts as misclassified")
    assert "earlier" not in one(tmp_path, "worst").sentence


def swapped(model: Model) -> None:
    model.index[3], model.index[7] = model.index[7], model.index[3]


def relabelled(model: Model) -> None:
    model.labels[5] += 1


def reordered(model: Model) -> None:
    model.index.reverse()
    model.labels.reverse()
    model.cells = {kind: column[::-1] for kind, column in model.cells.items()}


def other_image(model: Model) -> None:
    model.index[0] = 7


@pytest.mark.parametrize("change", [swapped, relabelled, reordered, other_image])
@pytest.mark.parametrize("model", [MIXTURE, PLAIN])
def test_other_images_are_never_paired(tmp_path: Path, change: object, model: str) -> None:
    models = {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))}
    assert callable(change)
    change(models[model])
    write_snapshot(tmp_path, models)
    found = one(tmp_path)
    assert (found.status, found.evidence) == ("not judged", None)
    assert found.sentence == (
        "mixture and baseline/adversarial were not evaluated on the same images in the same order"
    )


def test_models_attacked_with_different_epsilon_are_not_compared(tmp_path: Path) -> None:
    models = {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))}
    models[PLAIN].epsilon = 0.2
    write_snapshot(tmp_path, models)
    assert "attacked with different epsilon" in one(tmp_path).sentence


@pytest.mark.parametrize("file", ["decisions/mixture.csv", "evaluate/baseline-adversarial.json", "verdict.json"])
def test_a_missing_file_is_named_and_the_claim_not_judged(tmp_path: Path, file: str) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))})
    (tmp_path / "metrics" / file).unlink()
    assert one(tmp_path).sentence == f"{tmp_path}: has no metrics/{file}"


BROKEN = [
    ("decisions/mixture.csv", "index,label,clean,pgd,worst\n1,0,1,?,1\n", "must be 1, 0 or empty"),
    (
        "decisions/mixture.csv",
        "index,label,clean,pgd,worst\n1,0,1,1,1\n",
        "decisions and report on mixture do not agree",
    ),
    ("evaluate/mixture.json", "{", "cannot be read as JSON"),
    ("evaluate/mixture.json", '{"schema_version": 1}', "has schema version 1, this version of advmoe reads 2"),
    ("evaluate/mixture.json", "[]", "has schema version None"),
    ("evaluate/mixture.json", '{"schema_version": 2, "model": "mixture"}', "is missing"),
    ("verdict.json", "[]", "must be a mapping of models"),
]


@pytest.mark.parametrize(("file", "text", "reason"), BROKEN)
def test_a_malformed_file_is_an_error(tmp_path: Path, file: str, text: str, reason: str) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))})
    (tmp_path / "metrics" / file).write_text(text)
    with pytest.raises(UserError, match=reason):
        one(tmp_path)


def test_decisions_and_report_of_different_runs_are_an_error(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(20))})
    kept = (tmp_path / "metrics/decisions/baseline-adversarial.csv").read_text()
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(19))})
    (tmp_path / "metrics/decisions/baseline-adversarial.csv").write_text(kept)
    with pytest.raises(UserError, match="decisions and report on baseline/adversarial do not agree under pgd"):
        one(tmp_path)


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        ({"model": "a", "over": "a", "under": "worst"}, "compares a with itself"),
        ({"model": "a", "over": "b"}, "under: is missing"),
        ({"model": "", "over": "b", "under": "worst"}, "at least 1 character"),
        ({"model": "a", "over": "b", "under": "worst", "by": 1}, "by: is not a known key"),
    ],
)
def test_invalid_claims_are_refused(claim: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        validate(claim, Claim, "params.yaml", "claims.it")


def test_results_can_be_written_as_json(tmp_path: Path) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(8))})
    claim = Claim(model=MIXTURE, over=PLAIN, under="worst")
    found = evaluate_claims(
        FolderSnapshot(tmp_path), {"it": claim, "lost": claim.model_copy(update={"over": "x"})}, seed=0
    ).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["schema_version"], found["record"], found["commit"], found["judged"]) == (1, str(tmp_path), None, 1)
    assert found["claims"]["it"]["claim"] == {"model": MIXTURE, "over": PLAIN, "under": "worst"}
    assert found["claims"]["it"]["evidence"]["paired"]["only_first"] == 8
    assert found["claims"]["lost"]["evidence"] is None


def test_no_claims_give_no_results(tmp_path: Path) -> None:
    assert evaluate_claims(FolderSnapshot(tmp_path), {}, seed=0) == ClaimResults(str(tmp_path), None, ())


def test_results_are_printed_with_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_snapshot(tmp_path, {MIXTURE: model_wrong_on([]), PLAIN: model_wrong_on(range(8))})
    claims.show(
        evaluate_claims(FolderSnapshot(tmp_path), {"it": Claim(model=MIXTURE, over=PLAIN, under="worst")}, seed=0)
    )
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("mixture beats", "supported", "80.0 %", "8 images against 0"):
        assert part in shown


def test_reports_are_those_that_the_evaluation_writes() -> None:
    assert evaluation_files.SCHEMA == summary.SCHEMA
    assert evaluation_files.path("joint-expert/pgd-1") == summary.report_path("joint-expert/pgd-1")


@pytest.mark.parametrize(("p", "text"), [(0.0, "< 1e-06"), (0.041, "= 0.041"), (1.0, "= 1"), (1e-6, "= 1e-06")])
def test_a_rounded_p_value_is_never_shown_as_zero(p: float, text: str) -> None:
    assert claims.format_p_value(p) == text
