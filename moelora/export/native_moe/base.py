"""The weights of a dense base model, read one tensor at a time: from files, or from a model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from moelora.errors import ExportError
from moelora.hub.client import hub_errors
from moelora.runs.wording import one_line

_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class BaseWeights(Protocol):
    """What an export reads of a base model.

    Attributes:
        config: Its transformers configuration.
        shapes: The shape of each tensor by name.
        folder: Where its other files are, or None.
    """

    config: Any
    shapes: dict[str, tuple[int, ...]]
    folder: Path | None

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        ...


class FolderBase:
    """Weights in safetensors files; nothing but the tensor that is asked for is in memory.

    Args:
        name: A folder written by `save_pretrained`, or the name of a Hub repository.

    Raises:
        ExportError: If it holds no readable model in safetensors files.
        HubError: If the repository cannot be read.
    """

    def __init__(self, name: str) -> None:
        self.folder: Path | None = _folder_of(name)
        self.config = _config_of(self.folder, name)
        self._files = _weight_files(self.folder)
        self._open: dict[Path, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for file in self._files:
            try:
                self._open[file] = opened = safe_open(file, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ExportError(
                    f"{str(file)!r} of the base model is not a readable safetensors file ({one_line(error)}) It may be "
                    "cut off. Save or download it again."
                ) from error
            for key in opened.keys():  # noqa: SIM118 - not a dict
                self._places[key] = file
                self.shapes[key] = tuple(opened.get_slice(key).get_shape())

    def tensor(self, name: str) -> Tensor:
        """See `BaseWeights`."""
        found: Tensor = self._open[self._places[name]].get_tensor(name)
        return found


class ModelBase:
    """Weights of a model in memory, such as one that was read from a GGUF file.

    Args:
        model: A plain transformers model, without adapters.

    Raises:
        ExportError: If it carries adapters, or its weights are not in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PreTrainedModel):
            raise ExportError(
                f"the base is a {type(model).__name__}; allowed: a folder, a Hub name, or a model of transformers."
            )
        self.folder: Path | None = None
        self.config: Any = model.config
        self._tensors: dict[str, Tensor] = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        if any(".base_layer." in name for name in self.shapes):
            raise ExportError("the base model carries an adapter; allowed: a plain model. Call its `unload()` first.")
        if any(tensor.is_meta for tensor in self._tensors.values()):
            raise ExportError("weights of the base model are not in memory; allowed: a model that is loaded whole.")

    def tensor(self, name: str) -> Tensor:
        """See `BaseWeights`."""
        return self._tensors[name].detach().cpu()


def open_base(base: str | Path | nn.Module) -> BaseWeights:
    """The weights of a base model.

    Args:
        base: A folder, a Hub name, or a model in memory.

    Raises:
        ExportError: If it cannot be read, or is quantised.
        HubError: If its repository cannot be read.
    """
    opened: BaseWeights = ModelBase(base) if isinstance(base, nn.Module) else FolderBase(str(base))
    if getattr(opened.config, "quantization_config", None) is not None:
        raise ExportError(
            "the base model is quantised, so there are no plain weights to merge into; allowed: float32, bfloat16, "
            "float16. Load it dequantised and pass it as base=, or give the original model."
        )
    return opened


def _folder_of(name: str) -> Path:
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or folder.exists():
        raise ExportError(
            f"there is no folder {name!r} with a base model; give a folder, or a Hub name as 'owner/name'."
        )
    with hub_errors(name, "read"):
        return Path(snapshot_download(name, allow_patterns=_FILES, ignore_patterns=["*/*"]))


def _config_of(folder: Path, name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(
            f"the base model {name!r} has no readable config.json: {one_line(error)} Give a folder written by "
            "save_pretrained, or a Hub name."
        ) from error


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ExportError(f"{str(folder / _INDEX)!r} is not a readable index: {one_line(error)}") from error
        files = [folder / name for name in names]
    else:
        files = [folder / _SINGLE]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ExportError(
            f"the base model in {str(folder)!r} lacks {', '.join(missing)}; allowed: weights in safetensors files. For "
            "weights in another form (GGUF, .bin) load the model and pass it as base= to moelora.export.to_native_moe."
        )
    return files


def check_complete(base: BaseWeights) -> None:
    """Refuse weights that are not those of the model that the configuration describes.

    Raises:
        ExportError: If a tensor is missing, unknown or of another shape.
    """
    try:
        with torch.device("meta"):
            expected = AutoModelForCausalLM.from_config(base.config).state_dict()
    except ValueError as error:
        raise ExportError(f"the base model is no causal language model: {one_line(error)}") from error
    for name in [name for name in base.shapes if name.endswith(".rotary_emb.inv_freq")]:
        del base.shapes[name]  # computed from the configuration; old files hold it
    tied = {"lm_head.weight"} if base.config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - base.shapes.keys() - tied)
    unknown = sorted(base.shapes.keys() - expected.keys())
    unequal = sorted(n for n in expected.keys() & base.shapes.keys() if tuple(expected[n].shape) != base.shapes[n])
    for what, names in (("lack", missing), ("have the unknown", unknown), ("have another shape of", unequal)):
        if names:
            raise ExportError(
                f"the weights of the base model {what} {', '.join(names[:3])}{', ...' if len(names) > 3 else ''} "
                f"({len(names)} tensors), against its configuration of a {base.config.model_type!r}. Is it cut off, or "
                "of another class than a causal language model? Save or download it again."
            )
