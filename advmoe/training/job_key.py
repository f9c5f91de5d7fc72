"""Names of checkpoint files: a hash of everything that determines the result of a training job."""

from torch import nn

from advmoe.core.artifacts import hash_tensors
from advmoe.data.dataset import Dataset
from advmoe.models.layers import module_structure, simple_attributes
from advmoe.runtime.checkpoints.workdir import KEY_LENGTH, environment_fingerprint, hash_values
from advmoe.training.flops import HasLoss


def checkpoint_name(name: str, task: HasLoss, dataset: Dataset, settings: object) -> str:
    """Returns a file name with a hash of all that determines a training run: `settings`, the task and its network as
    they are now, the training and validation images, and the properties of the machine that affect rounding.
    """
    images = {
        f"{split}.{part}": tensor
        for split, rows in dataset.splits.items()
        if split in {"train", "validation"}
        for part, tensor in (("images", rows.images), ("labels", rows.labels))
    }
    key = hash_values(
        name,
        settings,
        [type(task).__qualname__, simple_attributes(vars(task))],
        model_fingerprint(task.model),
        hash_tensors(images),
        environment_fingerprint(),
    )
    return f"{name.replace('/', '-')}-{key[:KEY_LENGTH]}.safetensors"


def model_fingerprint(model: nn.Module) -> str:
    """Returns the sha256 over all that determines a network's outputs."""
    return hash_values(module_structure(model), hash_tensors(model.state_dict()))
