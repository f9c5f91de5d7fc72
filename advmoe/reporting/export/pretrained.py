"""A classifier from the Hugging Face Hub, or from a folder that `advmoe export --hub` wrote.

Needs the extra `advmoe[export]`. Shapes: B batch, C channel, H/W pixels, K classes.
"""

from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional

from advmoe.core.errors import UserError, first_line
from advmoe.reporting.export import extra, hub

try:
    from huggingface_hub import PyTorchModelHubMixin, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
except ImportError as error:
    raise extra.missing(error) from error


class RobustClassifier(nn.Module, PyTorchModelHubMixin, library_name="advmoe"):
    """Pixels in [0, 1], (B, C, H, W) -> log-probabilities (B, K), in eval mode; made by `from_pretrained`.

    `class_names` names the K classes, `description` says what the network is and where it comes from.
    """

    def __init__(self, pack: hub.Pack) -> None:
        super().__init__()
        self.model = pack.classifier.model
        self.description = pack.description
        self.class_names = pack.description.facts.class_names
        self._pack = pack
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
        """Read a folder, or fetch a repository of the Hub by its id, 'owner/name', and read that.

        The options are those of `huggingface_hub.snapshot_download`. Weights are safetensors or nothing, and content
        is checked against its hash. Raises UserError when there is no such model, or it is damaged or not advmoe's.
        """
        if model_kwargs:
            raise UserError(f"from_pretrained: {next(iter(model_kwargs))} is no option; the files describe the network")
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir():
            return cls(hub.read(folder))
        try:
            fetched = snapshot_download(
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
            raise UserError(f"{name}: neither a folder nor a model that the Hub gives ({first_line(error)})") from error
        return cls(hub.read(Path(fetched)))

    def _save_pretrained(self, save_directory: Path) -> None:
        """What `save_pretrained` and `push_to_hub` write: the same files as `advmoe export --hub`."""
        hub.write(save_directory, self._pack)
