"""Loads a classifier from the Hugging Face Hub, or from a folder written by `advmoe export --hub`.

Needs the extra `advmoe[export]`. Shapes: B batch, C channel, H/W pixels, K classes.
"""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError, error_summary
from advmoe.reporting.export import extra, hub

try:
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
except ImportError as error:
    raise extra.missing_package_error(error) from error


class RobustClassifier(nn.Module, PyTorchModelHubMixin, library_name="advmoe"):
    """Maps pixels in [0, 1], (B, C, H, W), to log-probabilities (B, K), in eval mode. Create it with `from_pretrained`.

    `class_names`: the K classes; `description`: architecture and provenance.
    """

    def __init__(self, exported: hub.ExportedModel) -> None:
        super().__init__()
        self.model = exported.classifier.model
        self.description = exported.description
        self.class_names = exported.description.facts.class_names
        self._exported = exported
        self.eval()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return functional.log_softmax(self.model(images_BCHW), dim=1)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Reads a folder, or downloads a repository of the Hub by its id 'owner/name'.

        The options are those of `huggingface_hub.snapshot_download`. Only safetensors weights are read, and
        their hash is checked. Raises UserError when the model is missing, damaged or not an export of advmoe.
        """
        if model_kwargs:
            raise UserError(
                f"from_pretrained: {next(iter(model_kwargs))} is not an option; the files describe the network"
            )
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls(hub.read(folder))
        try:
            path = snapshot_download(
                str(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
                allow_patterns=list(hub.FILES),
            )
        except (HfHubHTTPError, OSError, ValueError) as error:
            name = pretrained_model_name_or_path
            raise UserError(
                f"{name}: neither a folder nor an available model of the Hub ({error_summary(error)})"
            ) from error
        return cls(hub.read(Path(path)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """Writes the files of `save_pretrained` and `push_to_hub`, the same as `advmoe export --hub`."""
        hub.write(save_directory, self._exported)
