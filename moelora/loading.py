"""Loading an adapter: its file is checked against the model it goes into, and what fails leaves the model as it was.

PEFT loads what has a place and warns about some of the rest; it wraps the base model before it looks at the weights,
and writes tensors of the base that a file brings along over the base's own.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from torch import Tensor, nn

from moelora.config import MoeLoraConfig
from moelora.errors import AdapterFileError, MoeLoraError, TargetError
from moelora.fingerprint import check_base
from moelora.formats import check_finite, upgrade_keys
from moelora.layers.base import MoeLoraLayer
from moelora.peft_plugin import tuner_class
from moelora.peft_type import PREFIX
from moelora.undo import Snapshot

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BASE = "base_model.model."
# The largest share of a vocabulary that new tokens make.
_GROWN = 1 / 8


@contextmanager
def loading(model: nn.Module, source: Any) -> Iterator[None]:
    """Let an adapter be loaded wholly or not at all; errors of other libraries become one of ours.

    Args:
        model: What the adapter is loaded into. If nothing of moelora is in it, its errors are PEFT's own affair.
        source: Where the adapter is, for messages.

    Raises:
        AdapterFileError: If its files are missing or not readable.
    """
    before = Snapshot(model)
    try:
        yield
    except BaseException as error:
        if not any(isinstance(module, MoeLoraLayer) for module in model.modules()):
            if isinstance(error, Exception):
                _check_configuration(Path(str(source)))
            raise
        before.restore()
        if isinstance(error, MoeLoraError):
            if str(source) in str(error):
                raise
            raise type(error)(f"adapter {str(source)!r}: {error}", anchor=error.anchor) from error
        if isinstance(error, KeyError):
            raise AdapterFileError(
                f"the weights of the adapter {str(source)!r} lack {error}, which its configuration asks for "
                "(modules_to_save or trainable_token_indices). The file is not as it was saved."
            ) from error
        if isinstance(error, (OSError, SafetensorError, HFValidationError)):
            _check_has_weights(Path(str(source)))
            raise AdapterFileError(
                f"the adapter {str(source)!r} cannot be loaded: {' '.join(str(error).split()).rstrip('.')}. Allowed: a "
                "folder with adapter_config.json and a whole adapter_model.safetensors, or a name on the Hub."
            ) from error
        raise


def _check_configuration(folder: Path) -> None:
    """Say what is wrong with a configuration that cannot even tell its method.

    Raises:
        AdapterFileError: If it is no JSON object with a PEFT type.
    """
    config = folder / "adapter_config.json"
    if not config.is_file():
        return
    try:
        words = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise AdapterFileError(f"{str(config)!r} is not readable as JSON: {error}. It may be cut off.") from error
    if not isinstance(words, dict) or "peft_type" not in words:
        raise AdapterFileError(
            f"{str(config)!r} is not the configuration of an adapter; allowed: an object with peft_type."
        )


def _check_has_weights(folder: Path) -> None:
    """Say of a folder without weights that they are missing; PEFT would look for it on the Hub.

    Raises:
        AdapterFileError: If there are none.
    """
    if folder.is_dir() and not any(
        (folder / name).is_file() for name in ("adapter_model.safetensors", "adapter_model.bin")
    ):
        raise AdapterFileError(f"{str(folder)!r} has no weights; allowed: a folder with adapter_model.safetensors.")


def checked_weights(
    model: nn.Module, adapter_name: str, config: MoeLoraConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors to load, once all are known to be the adapter's, of the right shape, and finite.

    Args:
        model: The model with the adapter in place.
        adapter_name: Its name.
        config: Its configuration.
        weights: The file's tensors under the model's own names.

    Returns:
        The tensors without embeddings of the base that are equal to its own.

    Raises:
        TargetError: Names tensors without a place, places without a tensor, and tensors of another shape or data type;
            or the base is not the one that the adapter was saved on.
        AdapterFileError: If a tensor holds NaN or infinity.
    """
    state = model.state_dict()
    prefix = "" if any(key.startswith(_BASE) for key in state) else _BASE
    given = {key.removeprefix(prefix): tensor for key, tensor in weights.items()}
    own = {key for key in state if f".{PREFIX}" in key and f".{adapter_name}." in key}
    needed, allowed = _besides(model, adapter_name, config, state)
    given, unplaced = _without_base_embeddings(model, given, own | needed | allowed)
    check_finite({k: t for k, t in given.items() if t.dtype in _FLOATS}, "the adapter's file", AdapterFileError)
    empty = sorted((own | needed) - given.keys())
    faults = []
    if unplaced:
        faults.append(f"{len(unplaced)} of its tensors have no place ({unplaced[0]}, ...)")
    if empty:
        there, lacking = ({key.partition(f".{PREFIX}")[0] for key in keys & own} for keys in (given.keys(), set(empty)))
        whole = [name.removeprefix(_BASE) for name in sorted(lacking - there)]
        these = f", all those of {', '.join(whole[:4])}{', ...' if len(whole) > 4 else ''}" if whole else ""
        faults.append(f"{len(empty)} places get no tensor ({empty[0]}, ...){these}")
    placed = sorted(given.keys() & (own | needed | allowed))
    unequal = [key for key in placed if state[key].is_floating_point() and given[key].shape != state[key].shape]
    if unequal:
        key = unequal[0]
        found = f"{key} is {list(given[key].shape)} and should be {list(state[key].shape)}"
        faults.append(f"{len(unequal)} tensors have another shape ({found}, ...)")
    others = [key for key in placed if given[key].dtype not in (*_FLOATS, state[key].dtype)]
    if others:
        found = f"{others[0]} is {given[others[0]].dtype}; allowed: {', '.join(map(str, _FLOATS))}"
        faults.append(f"{len(others)} tensors have another data type ({found})")
    if faults:
        raise TargetError(
            f"the adapter's weights do not fit {type(model).__name__}: {'; '.join(faults)}. Allowed: the base model it "
            f"was trained on; its configuration names {config.base_model_name_or_path!r}."
        )
    check_base(model, config.base_fingerprint, config.base_model_name_or_path)
    return given


def swappable_weights(
    model: nn.Module, adapter_name: str, config: MoeLoraConfig, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors that PEFT's `hotswap_adapter` may copy over those of an adapter.

    Args:
        model: The model with the adapter that is replaced.
        adapter_name: Its name.
        config: The configuration of the adapter that takes its place.
        weights: The tensors of that adapter's file, with the adapter's name in theirs.

    Raises:
        TargetError: If the adapter has more than experts and routers, or does not fit, see `checked_weights`.
        AdapterFileError: If a tensor holds NaN or infinity.
    """
    words = ("modules_to_save", "trainable_token_indices", "bias")
    besides = {word: value for word in words if (value := getattr(config, word)) not in (None, [], "none")}
    if besides:
        said = " and ".join(f"{word}={value!r}" for word, value in besides.items())
        raise TargetError(
            f"hotswap_adapter replaces experts and routers only, and the new adapter has {said}; allowed: an adapter "
            "without. model.load_adapter loads it whole."
        )
    return checked_weights(model, adapter_name, config, upgrade_keys(weights))


def _besides(
    model: nn.Module, adapter_name: str, config: MoeLoraConfig, state: Mapping[str, Tensor]
) -> tuple[set[str], set[str]]:
    """What an adapter has beside experts and routers: the tensors it must have, and those that it may."""
    needed, wrappers = set(), []
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrappers.append(f"{name}.")
            needed |= {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    biases = set(tuner_class()._get_learnable_bias_state_dict(model, state, config))
    # those of modules that are saved whole come under other names
    needed |= {key for key in biases if not key.startswith(tuple(wrappers)) and f".{PREFIX}" not in key}
    return needed & state.keys(), (biases | needed) & state.keys()


def _without_base_embeddings(
    model: nn.Module, given: dict[str, Tensor], places: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Deal with embeddings that PEFT saved with the adapter: the tensors that are left, and the names of strangers.

    PEFT saves the base's embeddings where the vocabulary has grown. Rows that the base has are dropped; rows of new
    tokens at the end are taken, since the base's own are random.
    """
    embeddings = _embedding_weights(model)
    kept, strangers = dict(given), []
    for key in sorted(given.keys() - places):
        base, tensor = embeddings.get(key), given[key]
        if base is None or base.is_meta or base.shape != tensor.shape or not tensor.is_floating_point():
            strangers.append(key)
            continue
        tensor = tensor.to(base.device)
        same = ((tensor.to(base.dtype) == base) | (base.to(tensor.dtype) == tensor)).all(dim=1)
        count = len(same) if bool(same.all()) else int((~same).int().argmax())
        if count < len(same) * (1 - _GROWN):
            strangers.append(key)
            continue
        del kept[key]
        if count < len(same):
            kept[key] = torch.cat([base[:count], tensor[count:].to(base.dtype)])
            warnings.warn(
                f"the adapter brings its own rows of {key} for the tokens from {count} on, as PEFT saves them where a "
                "vocabulary has grown. They replace the base model's and stay when the adapter is unloaded; "
                "trainable_token_indices and modules_to_save keep them apart.",
                stacklevel=2,
            )
    return kept, strangers


def _embedding_weights(model: Any) -> dict[str, Tensor]:
    """The weights of the input and output embeddings by name, under each of their names."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = set()
    for get in ("get_input_embeddings", "get_output_embeddings"):
        weight = getattr(getattr(base, get, lambda: None)(), "weight", None)
        if weight is not None:
            found.add(id(weight))
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) in found and parameter.is_floating_point()
    }
