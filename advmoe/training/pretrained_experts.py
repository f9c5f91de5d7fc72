"""The pre-trained experts that a mixture starts from."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from advmoe.core import paths
from advmoe.core.errors import UserError
from advmoe.data.dataset import Dataset
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, Classifier, PlainArchitecture


def load_experts(names: Sequence[str], data: Dataset) -> dict[str, Classifier]:
    """Loads the experts in the order of `names`. Raises UserError when one is missing or was trained on other data."""
    experts = {name: classifiers.load(paths.artifact("pretrain", name)) for name in names}
    for name, expert in experts.items():
        check_trained_on(expert, paths.artifact("pretrain", name), data)
    return experts


def check_trained_on(classifier: Classifier, path: Path, data: Dataset) -> None:
    """Raises UserError for a classifier that was trained on other data; `path` is the file it names."""
    if classifier.header.inputs.get("dataset") != data.sha256:
        raise UserError(f"{path}: trained on other data than {paths.DATASET}; run `dvc repro`")


def backbone_of(experts: Mapping[str, Classifier]) -> BackboneSettings:
    """Returns the experts' common backbone. Raises UserError when they differ."""
    architectures = [expert.about.architecture for expert in experts.values()]
    backbones = {plain.backbone for plain in architectures if isinstance(plain, PlainArchitecture)}
    if len(backbones) != 1:
        raise UserError("train.experts: the experts have different backbones; run `dvc repro`")
    return backbones.pop()


def input_hashes(data: Dataset, experts: Mapping[str, Classifier]) -> dict[str, str]:
    """Returns the hashes of data set and experts for the header of a mixture."""
    return {"dataset": data.sha256} | {f"expert {name}": expert.header.sha256 for name, expert in experts.items()}
