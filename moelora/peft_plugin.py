"""Registration of the method in PEFT's tables: the only file that touches them.

PEFT has no entry point for outside methods and `register_peft_method` takes members of its own closed enum only, so the
tables are filled directly, under a str-Enum of our own: PEFT, transformers and TRL call `.value` on a peft_type.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from peft import PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils import hotswap
from torch import Tensor, nn

from moelora.errors import RegistrationError
from moelora.peft_type import PEFT_TYPE, PREFIX

Loading = Callable[[Any, Any], AbstractContextManager[None]]
Swapping = Callable[[nn.Module, str, Any, Mapping[str, Tensor]], dict[str, Tensor]]


def register(config_cls: type[Any], model_cls: type[Any], loading: Loading, swapping: Swapping) -> None:
    """Make `peft.get_peft_model` and `PeftModel.from_pretrained` know the method.

    Args:
        config_cls: `MoeLoraConfig`.
        model_cls: `MoeLoraModel`.
        loading: Makes the context in which a model gets an adapter from a place; it undoes what fails.
        swapping: From a model, an adapter's name, the configuration and the weights of another one to the weights that
            take the place of the adapter's; it refuses what does not fit.

    Raises:
        RegistrationError: If another package has registered the name or the parameter prefix.
    """
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(PEFT_TYPE)
    if registered is config_cls:
        return
    holders = [key for key, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == PREFIX]
    if registered is not None or holders:
        owner = getattr(registered, "__module__", None) or ", ".join(map(str, holders))
        raise RegistrationError(
            f"PEFT type {PEFT_TYPE.value!r} with prefix {PREFIX!r} is already taken by {owner!r}; it must be free for "
            "moelora. Two packages that use the same name cannot work in one process: import only one of them."
        )
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = config_cls
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = model_cls
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = PREFIX
    hotswap.CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = ["experts", "placement", "scores", "selection"]
    _guard_loading(loading)
    _guard_swapping(swapping)


def _guard_loading(loading: Loading) -> None:
    """Run PEFT's two ways to load an adapter within `loading`.

    PEFT wraps the base model, then reads the weights, and calls nothing of a method's in between: where they cannot be
    read, only who called it can put the model back.
    """
    load_adapter, from_pretrained = PeftModel.load_adapter, PeftModel.from_pretrained.__func__

    @functools.wraps(load_adapter)
    def guarded_load(self: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        with loading(self, model_id):
            return load_adapter(self, model_id, *args, **kwargs)

    @functools.wraps(from_pretrained)
    def guarded_from_pretrained(cls: Any, model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
        with loading(model, model_id):
            return from_pretrained(cls, model, model_id, *args, **kwargs)

    PeftModel.load_adapter = guarded_load
    PeftModel.from_pretrained = classmethod(guarded_from_pretrained)


def _guard_swapping(swapping: Swapping) -> None:
    """Run PEFT's hot swap on weights that `swapping` has checked.

    PEFT zeroes what it gets no tensor for and copies any value. `hotswap_adapter` looks this function up at each call,
    so that it is guarded wherever it was imported from and whenever.
    """
    swap = hotswap.hotswap_adapter_from_state_dict

    @functools.wraps(swap)
    def guarded(model: Any, state_dict: Any, adapter_name: str, config: Any, *args: Any, **kwargs: Any) -> None:
        if config.peft_type == PEFT_TYPE:
            state_dict = swapping(getattr(model, "_orig_mod", model), adapter_name, config, state_dict)
        swap(model, state_dict, adapter_name, config, *args, **kwargs)

    hotswap.hotswap_adapter_from_state_dict = guarded


def tuner_class() -> Any:
    """The registered `MoeLoraModel`."""
    return PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE]
