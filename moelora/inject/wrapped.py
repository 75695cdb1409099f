"""Whether a base model is wrapped already, so that a second wrapping would hide the first."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from moelora.errors import TargetError


def check_not_wrapped(model: nn.Module, peft_config: PeftConfig | dict[str, Any]) -> None:
    """Refuse to wrap a model a second time; further adapters go into the wrapping that is there.

    PEFT would only warn, and save a file without the adapter's tensors, since each wrapping has names of its own.

    Args:
        model: The model that the tuner is given.
        peft_config: What the tuner is given: a dict by adapter name from a `PeftModel` in the making, a single
            configuration from `inject_adapter_in_model` and transformers, which add to a model as often as they like.

    Raises:
        TargetError: If the model holds a `PeftModel`, or it is to become one and carries adapters.
    """
    wrapping = [type(module).__name__ for module in model.modules() if isinstance(module, (PeftModel, BaseTuner))]
    carries = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if not wrapping and not (carries and isinstance(peft_config, dict)):
        return
    reason = f"the model is in a {wrapping[0]} already" if wrapping else f"{carries[0]!r} carries an adapter already"
    raise TargetError(
        f"{reason}; allowed: a plain base model. To add an adapter beside the first, call "
        "`peft_model.add_adapter(name, config)` or `load_adapter`; to start anew, take the base model that "
        "`peft_model.unload()` returns.",
        anchor="second-wrap",
    )
