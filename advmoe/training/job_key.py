"""Names of checkpoint files: a hash of everything that determines the result of a training job."""

from torch import nn

from advmoe.core.artifacts import hash_tensors
from advmoe.data.dataset import Dataset
from advmoe.models.layers import plain, structure
from advmoe.runtime.checkpoints.workdir import KEY_LENGTH, environment_fingerprint, hash_of
from advmoe.training.flops import HasLoss


def checkpoint_name(name: str, learner: HasLoss, dataset: Dataset, settings: object) -> str:
    """A file name that holds a hash of all that determines a training run: `settings`, the learner and its network as
    they are now, the images learned from and watched, and what of the machine shows in the last bits.
    """
    images = {
        f"{split}.{part}": tensor
        for split, rows in dataset.splits.items()
        if split in {"train", "validation"}
        for part, tensor in (("images", rows.images), ("labels", rows.labels))
    }
    key = hash_of(
        name,
        settings,
        [type(learner).__qualname__, plain(vars(learner))],
        model_fingerprint(learner.model),
        hash_tensors(images),
        environment_fingerprint(),
    )
    return f"{name.replace('/', '-')}-{key[:KEY_LENGTH]}.safetensors"


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over all that determines what a network answers."""
    return hash_of(structure(model), hash_tensors(model.state_dict()))
