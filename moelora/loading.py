"""Whether the weights of an adapter file fit the model they are loaded into.

PEFT loads what has a place and warns about some of the rest, so an adapter of another base would be loaded in part.
"""

from __future__ import annotations

from collections.abc import Mapping

from peft import PeftModel
from torch import Tensor, nn

from moelora.config import MoeLoraConfig
from moelora.errors import TargetError
from moelora.layers.base import MoeLoraLayer
from moelora.peft_type import PREFIX


def check_weights(model: nn.Module, adapter_name: str, config: MoeLoraConfig, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not fill the adapter exactly.

    Args:
        model: The model with the adapter in place.
        adapter_name: Its name.
        config: Its configuration.
        weights: The file's tensors under the model's own names.

    Raises:
        TargetError: Names tensors without a place, places without a tensor, and shapes that differ. An adapter that was
            put in place just now, for these weights, is removed again.
    """
    own = f".{adapter_name}."
    places = {key: tensor for key, tensor in model.state_dict().items() if f".{PREFIX}" in key and own in key}
    given = {key: tensor for key, tensor in weights.items() if f".{PREFIX}" in key}
    unplaced = sorted(given.keys() - places.keys())
    empty = sorted(places.keys() - given.keys())
    unequal = sorted(key for key in given.keys() & places.keys() if given[key].shape != places[key].shape)
    if not (unplaced or empty or unequal):
        return
    faults = []
    if unplaced:
        faults.append(f"{len(unplaced)} of its tensors have no place ({unplaced[0]}, ...)")
    if empty:
        faults.append(f"{len(empty)} places get no tensor ({empty[0]}, ...)")
    if unequal:
        key = unequal[0]
        found = f"{key} is {list(given[key].shape)} and should be {list(places[key].shape)}"
        faults.append(f"{len(unequal)} tensors have another shape ({found}, ...)")
    _discard_if_fresh(model, adapter_name)
    raise TargetError(
        f"the adapter's weights do not fit {type(model).__name__}: {'; '.join(faults)}. Allowed: the base model it was "
        f"trained on; its configuration names {config.base_model_name_or_path!r}."
    )


def _discard_if_fresh(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter that has never been filled: what starts at 0 (all B) or 1 still is, or is without memory."""
    if not isinstance(model, PeftModel):
        return
    for layer in model.modules():
        if not isinstance(layer, MoeLoraLayer) or not layer.has_adapter(adapter_name):
            continue
        experts = (part for first, part in layer.parts[adapter_name].items() if first != "router")
        if not all(part.may_be_fresh() for part in experts):
            return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
