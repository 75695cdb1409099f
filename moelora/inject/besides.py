"""What PEFT trains next to the adapter's own layers: modules saved whole, chosen tokens, biases.

PEFT sets these up after the layers are in place and checks little, so what does not fit is refused here, before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moelora.config import MoeLoraConfig
from moelora.errors import TargetError
from moelora.inject.site import PlannedSite
from moelora.layers.modules import unwrapped

_HEADS = {
    TaskType.SEQ_CLS: ("classifier", "score"),
    TaskType.TOKEN_CLS: ("classifier", "score"),
    TaskType.QUESTION_ANS: ("qa_outputs",),
}


def head_names(config: MoeLoraConfig) -> tuple[str, ...]:
    """Endings of the heads that PEFT trains and saves whole for the configured task."""
    return _HEADS.get(config.task_type, ())


def _saved(modules: Mapping[str, nn.Module], config: MoeLoraConfig) -> dict[str, nn.Module]:
    # PEFT compares the end of the name as it is, without a dot before it
    names = (*(config.modules_to_save or ()), *head_names(config))
    return {name: module for name, module in modules.items() if name and name.endswith(names)}


def _token_embeddings(
    model: nn.Module, modules: Mapping[str, nn.Module], config: MoeLoraConfig
) -> Iterator[tuple[str, dict[str, nn.Module], list[int]]]:
    """For each entry of `trainable_token_indices` its name, the modules it matches, and the tokens."""
    indices = config.trainable_token_indices
    if indices is None:
        return
    if not isinstance(indices, dict):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        names = [name for name, module in modules.items() if module is embedding]
        indices = {names[0] if names else "embed_tokens": indices}
    for ending, tokens in indices.items():
        yield ending, {name: module for name, module in modules.items() if name.endswith(ending)}, list(tokens)


def check_besides(
    model: nn.Module, modules: Mapping[str, nn.Module], config: MoeLoraConfig, sites: Mapping[str, PlannedSite]
) -> None:
    """Refuse what matches nothing or collides with the adapter's sites.

    Args:
        model: The base model.
        modules: Its modules by name (`inject.base_modules`).
        config: The configuration.
        sites: The planned sites.

    Raises:
        TargetError: Says which name is at fault.
    """
    saved = _saved(modules, config)
    for ending in config.modules_to_save or ():
        found = [name for name in saved if name.endswith(ending)]
        if not found and ending not in head_names(config):
            children = sorted({name.rsplit(".", 1)[-1] for name in modules if name})
            raise TargetError(
                f"modules_to_save={config.modules_to_save!r}: {ending!r} match no module of {type(model).__name__}; "
                f"allowed: endings of module names ({', '.join(children[:20])}, ...)."
            )
    wrapped = {module for site in sites.values() for module in (site.name, *site.linears.values())}
    for name in saved:
        for site_name in sorted(wrapped):
            if f"{name}.".startswith(f"{site_name}.") or f"{site_name}.".startswith(f"{name}."):
                ending = next(e for e in (*(config.modules_to_save or ()), *head_names(config)) if name.endswith(e))
                raise TargetError(
                    f"modules_to_save={config.modules_to_save!r}: {ending!r} matches {name!r}, but the adapter wraps "
                    f"{site_name!r}; allowed: modules that share nothing with the adapter's. Write longer names in "
                    "modules_to_save, or leave the module out with exclude_modules."
                )
    for ending, matched, tokens in _token_embeddings(model, modules, config):
        what = f"trainable_token_indices: {ending!r}"
        sizes: dict[str, int] = {name: getattr(module, "num_embeddings", -1) for name, module in matched.items()}
        if not sizes or -1 in sizes.values():
            embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
            raise TargetError(
                f"{what} match no embedding of {type(model).__name__}; allowed: {', '.join(embeddings) or 'none'}."
            )
        for name, size in sizes.items():
            if name in saved:
                raise TargetError(
                    f"{what} matches {name!r}, which modules_to_save trains whole; allowed: one of the two, not both."
                )
            wrong = [token for token in tokens if not 0 <= token < size]
            if wrong:
                raise TargetError(f"{what} has the tokens {wrong}; allowed: 0 to {size - 1}.")


def count_besides(
    model: nn.Module, modules: Mapping[str, nn.Module], config: MoeLoraConfig, sites: Mapping[str, PlannedSite]
) -> int:
    """Number of parameters that are trained besides the adapter's own; arguments as in `check_besides`."""
    counted: dict[int, int] = {}
    for module in _saved(modules, config).values():
        if isinstance(module, AuxiliaryTrainingWrapper):  # saved whole by another adapter already
            module = module.original_module
        counted.update((id(parameter), parameter.numel()) for parameter in module.parameters())
    if config.bias != "none":
        adapted = {site.linears[role] for site in sites.values() for role in site.roles}
        for name, module in modules.items():
            bias = unwrapped(module)._parameters.get("bias")
            if bias is not None and (config.bias == "all" or name in adapted):
                counted[id(bias)] = bias.numel()
    total = sum(counted.values())
    for _, matched, tokens in _token_embeddings(model, modules, config):
        for module in matched.values():
            width: Any = module.embedding_dim
            total += len(tokens) * width
    return total
