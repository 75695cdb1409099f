"""LoRAs that are to be experts of one base model: their names, and whether they go together and with the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from moelora.compose.sources import LoraSource
from moelora.errors import ComposeError
from moelora.layers.modules import is_linear, linear_size
from moelora.validation import unusable_name


class Untouched:
    """What a base model is before it is wrapped, to make it so again.

    Args:
        base: The base model.
    """

    def __init__(self, base: Any) -> None:
        self.base, self.training = base, base.training
        self.asked = [parameter for parameter in base.parameters() if parameter.requires_grad]

    def restore(self, model: PeftModel) -> None:
        """Take the adapters off, and give modes and gradients back."""
        wrappers = {n: m for n, m in self.base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        model.unload()
        # PEFT leaves the adapter's copies of modules that are trained whole in the place of the base's own
        for name, wrapper in wrappers.items():
            self.base.set_submodule(name, wrapper.original_module)
        self.base.train(self.training)
        for parameter in self.asked:
            parameter.requires_grad_(True)


def named_sources(loras: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, str]:
    """Sources by the name of the expert.

    Raises:
        ComposeError: If there are none, two have the same name, or a name cannot be that of a folder.
    """
    if isinstance(loras, Mapping):
        named = {name: str(source) for name, source in loras.items()}
    else:
        names = [Path(str(source).rstrip("/")).name for source in loras]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ComposeError(
                f"several LoRAs are called {', '.join(twice)} by the ends of their paths; allowed: names that differ. "
                "Give each a name: NAME=PATH, or a dict of paths by name."
            )
        named = dict(zip(names, map(str, loras), strict=True))
    check_expert_names(named)
    if not named:
        raise ComposeError("there are no LoRAs to compose; allowed: at least one.")
    return named


def check_expert_names(names: Iterable[object]) -> None:
    """Refuse names of experts that cannot be names of folders, which is what an export makes of them.

    Raises:
        ComposeError: With the first such name.
    """
    for name in names:
        reason = unusable_name(name)
        if reason is not None:
            shown = repr(name) if len(repr(name)) < 80 else f"{repr(name)[:80]}..."
            raise ComposeError(
                f"the name of an expert {shown} {reason}; allowed: a name that a folder can have, of at most 200 "
                "bytes. Name it otherwise (NAME=LORA, `--name NAME`)."
            )


def check_names(base: Any, sources: Sequence[LoraSource], check: bool) -> None:
    """Refuse LoRAs of different bases, task types, or of another base than this, by what they state.

    Args:
        base: The base model.
        sources: The LoRAs.
        check: Whether the names of bases count; task types do always.

    Raises:
        ComposeError: With the names.
    """
    types = {source.config.task_type for source in sources}
    if len(types) > 1:
        found = ", ".join(f"{source.name}: {source.config.task_type}" for source in sources)
        raise ComposeError(f"the LoRAs are for different task types ({found}); allowed: one.")
    if not check:
        return
    own = getattr(getattr(base, "config", None), "_name_or_path", None)
    stated = {source.name: source.config.base_model_name_or_path for source in sources}
    # the same model may be in a folder here and on the Hub there: the last part of its name is compared
    last = {name: Path(str(of).rstrip("/")).name.lower() for name, of in {**stated, "the base": own}.items() if of}
    if len(set(last.values())) > 1:
        found = ", ".join(f"{name}: {stated.get(name, own)!r}" for name in last)
        raise ComposeError(
            f"the LoRAs and the base model name different bases ({found}); allowed: one. If they are the same model "
            "under different names, pass check_base_name=False (`--any-base-name`)."
        )


def shared_modules(sources: Sequence[LoraSource], new: Sequence[str]) -> dict[str, Tensor]:
    """What the LoRAs saved of whole modules, where it can be one thing for all of them: by the base's tensors.

    Args:
        sources: The LoRAs.
        new: Modules that the composition trains anew: what the LoRAs saved of them does not count.

    Raises:
        ComposeError: If two LoRAs saved the same module with other values.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for source in sources:
        for name, tensor in source.saved.items():
            module = name.rpartition(".")[0]
            if any(f".{module}.".endswith(f".{each}.") or f".{each}." in f".{name}" for each in new):
                continue
            first, other = found.setdefault(name, (source.name, tensor))
            if tensor.shape != other.shape or not torch.equal(tensor, other):
                raise ComposeError(
                    f"the LoRAs {first!r} and {source.name!r} each saved {module!r} whole, with other values, and the "
                    f"composition has one; allowed: equal ones, one LoRA that has it, or modules_to_save=[{module!r}], "
                    "which leaves theirs out and trains a new one."
                )
    return {name: tensor for name, (_, tensor) in found.items()}


def write_shared(model: PeftModel, adapter: str, saved: Mapping[str, Tensor]) -> None:
    """Put what LoRAs saved of whole modules into the composition's.

    Raises:
        ComposeError: If the base model has no such tensor, or another shape of it.
    """
    own = {
        f"{name}.{tensor}": value
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for tensor, value in module.modules_to_save[adapter].state_dict().items()
    }
    for name, tensor in saved.items():
        if name not in own or own[name].shape != tensor.shape:
            has = "none" if name not in own else str(list(own[name].shape))
            raise ComposeError(
                f"a LoRA saved {name} {list(tensor.shape)}, and the base model has {has}; allowed: LoRAs of this base "
                "model, with as many labels."
            )
        own[name].copy_(tensor)


def check_fit(modules: Mapping[str, nn.Module], source: LoraSource, base: str) -> None:
    """Refuse a LoRA on linears that the base does not have, or has with other sizes.

    Args:
        modules: The modules of the base model by name.
        source: The LoRA.
        base: What the base model is called in the message.

    Raises:
        ComposeError: With the linear.
    """
    for name, (_, in_features, out_features) in source.shapes.items():
        module = modules.get(name)
        if module is None or not is_linear(module):
            found = "no such module" if module is None else f"a {type(module).__name__} there"
            raise ComposeError(
                f"the LoRA {source.source!r} adapts {name!r}, and {base} has {found}; allowed: a LoRA of this base "
                f"model (it names {source.config.base_model_name_or_path!r})."
            )
        if linear_size(module) != (in_features, out_features):
            raise ComposeError(
                f"the LoRA {source.source!r} is made for {in_features} inputs and {out_features} outputs at {name!r}, "
                f"and {base} has {linear_size(module)} there; allowed: a LoRA of this base model (it names "
                f"{source.config.base_model_name_or_path!r})."
            )
