"""Registration of the method in PEFT's tables: the only file that touches them.

PEFT has no entry point for outside methods and `register_peft_method` takes members of its own closed enum only, so the
tables are filled directly, under a str-Enum of our own: PEFT, transformers and TRL call `.value` on a peft_type.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from moelora.errors import RegistrationError
from moelora.peft_type import PEFT_TYPE, PREFIX


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Make `peft.get_peft_model` and `PeftModel.from_pretrained` know the method.

    Args:
        config_cls: `MoeLoraConfig`.
        model_cls: `MoeLoraModel`.

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
    CONFIG_KEYS_TO_CHECK[PEFT_TYPE] = ["experts", "placement", "scores", "selection"]


def tuner_class() -> Any:
    """The registered `MoeLoraModel`."""
    return PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE]
