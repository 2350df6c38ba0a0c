"""Models on the Hugging Face hub, by the hub's own mixin; the repository there is a model folder.

from s4audio.hub import HubModel

HubModel("runs/mine/best").push_to_hub("me/violin")
model = HubModel.from_pretrained("me/violin").model
"""

from pathlib import Path
from typing import Any

from s4audio import checkpoint

try:
    from huggingface_hub import ModelHubMixin, snapshot_download
except ImportError as error:
    raise ImportError("the hub needs a package that is not installed: pip install 's4audio[hub]'") from error


class HubModel(ModelHubMixin):
    """A saved model with the hub's three methods: `save_pretrained`, `push_to_hub` and `from_pretrained`.

    Args:
        folder: the model folder; it is read once, here.

    Raises:
        CheckpointError: there is no model in it, or it is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.model, self.training = checkpoint.load(folder), checkpoint.read_config(folder)["training"]

    def _save_pretrained(self, save_directory: Path) -> None:
        checkpoint.save(self.model, save_directory, self.training)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **options: Any) -> "HubModel":
        """From a folder, or from a repository, of which only the two files of a model are fetched."""
        if Path(model_id).is_dir():
            return cls(model_id)
        wanted = {key: options[key] for key in ("revision", "cache_dir", "force_download", "local_files_only", "token")}
        return cls(snapshot_download(model_id, allow_patterns=[checkpoint.CONFIG, checkpoint.WEIGHTS], **wanted))
