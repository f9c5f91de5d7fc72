"""Detectors on networks whose features or predictions separate the poison, and on some that do not.

Shapes: N images, C channel, H/W pixels, F features, K classes.
"""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from advmoe.core.errors import UserError
from advmoe.data.dataset import DatasetInfo, Split
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, GateSettings, MixtureArchitecture, PlainArchitecture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.models.resnet import ResNet18
from advmoe.runtime.machine import generator
from advmoe.threats.poisoning.detectors.clustering import Clustering, clustering, smaller_cluster
from advmoe.threats.poisoning.detectors.inputs import DetectorInputs, features
from advmoe.threats.poisoning.detectors.registry import AnyDetector, Oracle, flag_poison
from advmoe.threats.poisoning.detectors.spectral import Spectral, outlier_scores, spectral
from advmoe.threats.poisoning.detectors.strip import Strip, StripDetector, strip

CLASSES, EACH = 3, 40
POISONED = 8  # images of class 0 that carry the mark
FACTS = DatasetInfo(channels=1, height=8, width=8, class_names=("a", "b", "c"), mean=(0.5,), std=(0.25,))
SPECTRAL = Spectral(kind="spectral", expected=0.15, excess=1.5)
CLUSTERING = Clustering(kind="clustering", dimensions=5, below=0.35)
STRIP = Strip(kind="strip", blends=16, false_positives=0.1)


class MarkedNetwork(ResNet18):
    """Its features are the first two rows of pixels, so a mark there separates; its answer is a class, surely so for
    images with a white last pixel, half of one is not enough, and unsurely for all others.
    """

    def __init__(self) -> None:
        super().__init__(channels=1, classes=CLASSES, width=1, mean=(0.5,), std=(0.25,))

    def features(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW[:, 0, :2].flatten(1)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        is_marked = (images_BCHW[:, 0, -1, -1] > 0.9).float()
        hue = images_BCHW[:, 0, 2:7].flatten(1).mean(dim=1)
        return torch.stack([20 * is_marked, hue, 1 - hue], dim=1)


def stream(*parts: object) -> torch.Generator:
    return generator("test_poisoning_defences", *parts)


def make_split(name: str, count: int = CLASSES * EACH) -> Split:
    """Noise in the lower half of the range, a black last pixel."""
    images = torch.randint(0, 100, (count, 1, 8, 8), generator=stream(name), dtype=torch.uint8)
    images[:, :, -1, -1] = 0
    return Split(images, torch.arange(count) % CLASSES, torch.arange(count))


def marked() -> tuple[Split, Tensor]:
    """A training set in which some images of class 0 carry a mark; and which they are."""
    split = make_split("train")
    rows = (split.labels == 0).nonzero().squeeze(1)[3 : 3 + POISONED]
    split.images[rows, :, :2] = torch.randint(180, 256, (POISONED, 1, 2, 8), generator=stream("mark")).to(torch.uint8)
    split.images[rows, :, -1, -1] = 255
    is_poison = torch.zeros(len(split), dtype=torch.bool)
    is_poison[rows] = True
    return split, is_poison


def make_evidence(train: Split, victim: nn.Module | None = None, seed: int = 0) -> DetectorInputs:
    return DetectorInputs(victim or MarkedNetwork().eval(), train, make_split("clean", 400), stream("evidence", seed))


# ---- spectral signatures


def test_spectral_finds_the_mark_and_removes_its_quota_of_every_class() -> None:
    train, is_poison = marked()
    flagged = spectral(make_evidence(train), SPECTRAL)
    assert flagged[is_poison].all()
    for label in range(CLASSES):
        assert int(flagged[train.labels == label].sum()) == round(1.5 * 0.15 * EACH) == 9
    assert int(flagged[(train.labels == 0) & ~is_poison].sum()) == 1  # nine for eight


@pytest.mark.parametrize(
    ("expected", "excess", "quota"), [(0.1, 1.5, 6), (0.2, 1.0, 8), (0.01, 1.0, 0), (0.5, 1.9, 38)]
)
def test_spectral_removes_excess_times_the_expected_share(expected: float, excess: float, quota: int) -> None:
    settings = Spectral(kind="spectral", expected=expected, excess=excess)
    flagged = spectral(make_evidence(make_split("train")), settings)
    assert int(flagged.sum()) == CLASSES * quota


def test_the_quota_is_of_each_class_not_of_the_set() -> None:
    split = make_split("train", 60)
    labels = torch.tensor([0] * 40 + [1] * 20)
    flagged = spectral(make_evidence(Split(split.images, labels, split.index)), SPECTRAL)
    assert [int(flagged[labels == label].sum()) for label in (0, 1)] == [9, 4]


def test_outlier_scores_are_squared_projections_on_the_widest_direction() -> None:
    # centred: x is -2, -1, 0, 3 and y is 0.1, -0.1, 0.1, -0.1; the widest direction is nearly x
    points = torch.tensor([[8.0, 5.1], [9.0, 4.9], [10.0, 5.1], [13.0, 4.9]])
    assert outlier_scores(points).tolist() == pytest.approx([4, 1, 0, 9], abs=0.2)
    assert outlier_scores(points - 64).tolist() == pytest.approx(outlier_scores(points).tolist(), abs=1e-4)


def test_a_class_of_one_image_breaks_no_detector() -> None:
    split = make_split("train", 41)
    labels = torch.tensor([0] * 40 + [2])
    evidence = make_evidence(Split(split.images, labels, split.index))
    assert not spectral(evidence, SPECTRAL)[40]
    assert not clustering(evidence, CLUSTERING)[40]


@pytest.mark.parametrize(("expected", "excess"), [(0.5, 2.0), (0.9, 1.5), (0.7, 1.5)])
def test_spectral_may_not_remove_a_whole_class(expected: float, excess: float) -> None:
    with pytest.raises(ValidationError, match=f"removes a whole class: {excess:g} times an expected share"):
        Spectral(kind="spectral", expected=expected, excess=excess)


# ---- activation clustering


def test_clustering_finds_the_mark_and_little_else() -> None:
    train, is_poison = marked()
    flagged = clustering(make_evidence(train), CLUSTERING)
    of_class = train.labels == 0
    assert torch.equal(flagged[of_class], is_poison[of_class])


def test_two_clusters_of_equal_size_are_not_flagged() -> None:
    split = make_split("train")
    first = (split.labels == 0).nonzero().squeeze(1)[: EACH // 2]
    split.images[first, :, :2] = 250
    flagged = clustering(make_evidence(split), CLUSTERING)
    assert not flagged[split.labels == 0].any()


@pytest.mark.parametrize(("below", "found"), [(0.25, True), (0.15, False)])
def test_the_smaller_cluster_is_flagged_below_a_share(below: float, found: bool) -> None:
    train, is_poison = marked()  # a fifth of class 0
    flagged = clustering(make_evidence(train), CLUSTERING.model_copy(update={"below": below}))
    assert bool(flagged[is_poison].all()) == found
    assert bool(flagged[is_poison].any()) == found


def test_the_smaller_cluster_is_the_smaller_one() -> None:
    points = torch.cat([torch.zeros(7, 3), torch.full((3, 3), 9.0)]) + torch.rand((10, 3), generator=stream("jitter"))
    assert smaller_cluster(points, 2, 0).tolist() == [False] * 7 + [True] * 3
    assert smaller_cluster(points.flip(0), 10, 0).tolist() == [True] * 3 + [False] * 7


# ---- STRIP


def test_strip_finds_images_that_keep_their_class_under_any_blend() -> None:
    train, is_poison = marked()
    flagged = strip(make_evidence(train), STRIP)
    assert flagged[is_poison].all()
    assert float(flagged[~is_poison].float().mean()) < 0.25


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_strip_flags_about_as_many_clean_images_as_it_may(share: float) -> None:
    settings = Strip(kind="strip", blends=16, false_positives=share)
    detector = StripDetector(make_evidence(make_split("train")), settings)
    fresh = make_split("held out", 1000)  # neither blended in nor behind the threshold
    assert float(detector.flag(fresh.images).float().mean()) == pytest.approx(share, abs=0.08)


def test_strip_finds_nothing_where_no_answer_is_steady() -> None:
    train, is_poison = marked()
    train.images[:, :, -1, -1] = 0  # the mark that its network knows is gone
    flagged = strip(make_evidence(train), STRIP)
    assert float(flagged[is_poison].float().mean()) < 0.7


def test_the_entropy_is_of_the_answers_in_nats() -> None:
    train, _ = marked()
    detector = StripDetector(make_evidence(train), STRIP)
    unsure, sure = detector._entropies(train.images[[0, 9]].float() / 255)
    assert train.images[9, 0, -1, -1] == 255
    assert float(sure) < 0.01
    assert 0.9 < float(unsure) < float(torch.tensor(3.0).log()) + 1e-6


def test_strip_needs_two_clean_images() -> None:
    evidence = make_evidence(make_split("train"))
    assert StripDetector(replace(evidence, clean=evidence.clean.first(2)), STRIP).flag(evidence.train.images).shape
    with pytest.raises(UserError, match=r"^strip needs at least two validation images"):
        StripDetector(replace(evidence, clean=evidence.clean.first(1)), STRIP)


# ---- all of them


@pytest.mark.parametrize("settings", [SPECTRAL, CLUSTERING, STRIP, Oracle(kind="oracle")], ids=lambda each: each.kind)
def test_detectors_repeat_themselves_and_leave_the_victim_alone(settings: AnyDetector) -> None:
    train, is_poison = marked()
    victim = MarkedNetwork().train()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = flag_poison(make_evidence(train, victim), settings, is_poison)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(flag_poison(make_evidence(train, victim), settings, is_poison), first)
    assert victim.training
    assert all(parameter.requires_grad for parameter in victim.parameters())


@pytest.mark.parametrize("settings", [SPECTRAL, CLUSTERING, STRIP], ids=lambda each: each.kind)
def test_only_the_oracle_uses_the_poison_mask(settings: AnyDetector) -> None:
    train, is_poison = marked()
    assert torch.equal(
        flag_poison(make_evidence(train), settings, is_poison), flag_poison(make_evidence(train), settings, ~is_poison)
    )


def test_the_oracle_flags_exactly_the_poison() -> None:
    train, is_poison = marked()
    flagged = flag_poison(make_evidence(train), Oracle(kind="oracle"), is_poison)
    assert torch.equal(flagged, is_poison)
    flagged[:] = True
    assert not is_poison.all()  # a copy


@pytest.mark.parametrize("settings", [SPECTRAL, CLUSTERING, STRIP], ids=lambda each: each.kind)
def test_detectors_run_on_real_networks(settings: AnyDetector) -> None:
    train, is_poison = marked()
    for architecture in (PLAIN, MIXTURE):
        victim = classifiers.build(architecture, FACTS, 0).eval()
        flagged = flag_poison(make_evidence(train, victim), settings, is_poison)
        assert (flagged.shape, flagged.dtype) == (train.labels.shape, torch.bool)


PLAIN = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="resnet18", width=2))
MIXTURE = MixtureArchitecture(
    kind="mixture",
    backbone=PLAIN.backbone,
    experts=("left", "right"),
    gate=GateSettings(width=2, temperature=1.0),
    mixing="probabilities",
)


def test_features_are_what_the_last_layer_reads() -> None:
    model, split = classifiers.build(PLAIN, FACTS, 0).eval(), make_split("train", 10)
    assert isinstance(model, ResNet18)
    with torch.no_grad():
        assert torch.equal(features(model, split.pixels()), model.features(split.pixels()))
        torch.testing.assert_close(model.classify(features(model, split.pixels())), model(split.pixels()))


def test_features_of_a_mixture_are_those_of_all_experts() -> None:
    model, split = classifiers.build(MIXTURE, FACTS, 0).eval(), make_split("train", 10)
    assert isinstance(model, MixtureOfExperts)
    left, right = (features(expert, split.pixels()) for expert in model.experts)
    assert torch.equal(features(model, split.pixels()), torch.cat([left, right], dim=1))
