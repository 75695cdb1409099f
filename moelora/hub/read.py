"""Read what an adapter is, from a folder or from the Hub, without its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from safetensors import SafetensorError, safe_open

from moelora.config import MoeLoraConfig
from moelora.errors import HubError
from moelora.formats import upgrade_keys
from moelora.hub.client import CONFIG_FILE, WEIGHTS_FILE, hub_errors
from moelora.hub.info import AdapterInfo, TensorHeader
from moelora.peft_type import PEFT_TYPE


def read_adapter(source: str | Path, *, revision: str | None = None, token: str | bool | None = None) -> AdapterInfo:
    """Read what an adapter is.

    Args:
        source: A folder that holds adapter_config.json and adapter_model.safetensors, or the name of a Hub repository.
        revision: Branch, tag or commit of the repository; None is its main branch.
        token: Token for a private repository; None is the one logged in with.

    Raises:
        HubError: If there is no such adapter, it cannot be reached, or it is not one of moelora's.
        FormatVersionError: If it was written in a newer format than this version reads.
        ConfigError: If its configuration is not valid.
    """
    source = str(source)
    if Path(source).is_dir():
        folder = Path(source)
        tensors = _local_headers(folder)
    else:
        _check_hub_name(source)
        with hub_errors(source, "read"):
            metadata = HfApi(token=token).parse_safetensors_file_metadata(source, WEIGHTS_FILE, revision=revision)
            config_file = hf_hub_download(source, CONFIG_FILE, revision=revision, token=token)
        tensors = [TensorHeader(name, t.dtype, tuple(t.shape)) for name, t in metadata.tensors.items()]
        folder = Path(config_file).parent
    named = upgrade_keys({tensor.name: tensor for tensor in tensors})
    tensors = [dataclasses.replace(tensor, name=name) for name, tensor in named.items()]
    return AdapterInfo(source=source, config=_read_config(folder, source), tensors=tuple(tensors))


def local_folder(source: str | Path, *files: str) -> Path:
    """The folder of an adapter, downloaded if it is a Hub repository.

    Args:
        source: A folder, or the name of a Hub repository.
        files: What to download of a repository; patterns with `*` are allowed.

    Raises:
        HubError: If there is neither, or it cannot be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    _check_hub_name(str(source))
    with hub_errors(str(source), "read"):
        return Path(snapshot_download(str(source), allow_patterns=list(files)))


def _check_hub_name(source: str) -> None:
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or Path(source).exists():
        raise HubError(f"there is no folder {source!r}; give an adapter's folder, or a Hub repository as 'owner/name'.")


def _read_config(folder: Path, source: str) -> MoeLoraConfig:
    words = read_json(folder / CONFIG_FILE)
    if words.get("peft_type") != PEFT_TYPE.value:
        raise HubError(
            f"{source!r} is not a moelora adapter: its {CONFIG_FILE} says peft_type {words.get('peft_type')!r}, not "
            f"{PEFT_TYPE.value!r}. Use PEFT itself for adapters of its own methods."
        )
    config: MoeLoraConfig = MoeLoraConfig.from_pretrained(str(folder))
    return config


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        HubError: If it is not valid JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise HubError(
            f"{str(path)!r} is not valid JSON ({error}); it may be cut off. Save or download it again."
        ) from error


def _local_headers(folder: Path) -> list[TensorHeader]:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        inside = sorted(str(path.parent) for path in folder.rglob(CONFIG_FILE))
        hint = f" Adapters inside it: {', '.join(inside)}." if inside else " Save one with `model.save_pretrained`."
        raise HubError(f"{str(folder)!r} holds no adapter: {' and '.join(missing)} missing.{hint}")
    return read_headers(folder / WEIGHTS_FILE)


def read_headers(weights: Path) -> list[TensorHeader]:
    """The header of a safetensors file.

    Raises:
        HubError: If it is damaged.
    """
    try:
        with safe_open(weights, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return [TensorHeader(name, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()]
    except SafetensorError as error:
        raise HubError(
            f"{str(weights)!r} is not a readable safetensors file ({error}); it may be cut off. Save or download it "
            "again."
        ) from error
