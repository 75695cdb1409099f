"""The name of the method in PEFT's tables."""

from __future__ import annotations

import enum

PREFIX = "moelora_"
"""transformers builds it as `peft_type.lower() + "_"`, so it cannot be chosen freely."""


class MoeLoraPeftType(str, enum.Enum):
    """moelora's entry in place of a `peft.PeftType` member. Name and value are equal, since lookups come by either."""

    MOELORA = "MOELORA"


PEFT_TYPE = MoeLoraPeftType.MOELORA
