"""The tuner: puts the layers of a plan into a base model, under PEFT's contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, NoReturn

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moelora.config import MoeLoraConfig
from moelora.errors import AdapterNameError, MergeError, TargetError
from moelora.fingerprint import fingerprint
from moelora.formats import upgrade_keys
from moelora.inject.base_modules import base_modules
from moelora.inject.plan import count_trainable_parameters, plan_sites
from moelora.inject.site import PlannedSite
from moelora.inject.wrapped import check_not_wrapped
from moelora.layers.base import MERGE_REASON, MoeLoraLayer
from moelora.layers.biases import move_biases
from moelora.layers.block import MixtureBlock
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.linear import MixtureLinear
from moelora.layers.modules import unwrapped
from moelora.layers.split_feed_forward import MixtureSplitFeedForward, PassThrough, pass_on
from moelora.loading import checked_weights
from moelora.peft_type import PREFIX
from moelora.routing.batch import FACTS
from moelora.routing.run import (
    RunHooks,
    adapters_of_rows,
    attach_hooks,
    batch_facts,
    detach_hooks,
    known_facts,
    own_hooks,
)
from moelora.undo import undone_on_error
from moelora.validation import unusable_name

TAGS = ["moelora", "mixture-of-lora-experts"]


class MoeLoraModel(BaseTuner):
    """A base model with routed mixtures of LoRA experts; made by `peft.get_peft_model(base, MoeLoraConfig(...))`.

    Args:
        model: The base model.
        peft_config: The configuration.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Whether to make the adapter's parameters on the meta device.
        state_dict: Inject where this adapter state dict has keys (see PEFT).

    Raises:
        TargetError: If the configuration does not fit the model, or the model is wrapped already; it is then unchanged.
        AdapterNameError: If the name is part of a module's path.
    """

    prefix: str = PREFIX
    tuner_layer_cls = MoeLoraLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        check_not_wrapped(model, peft_config)
        with undone_on_error(model):
            super().__init__(model, peft_config, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """See `BaseTuner.inject_adapter`; the hooks are installed once the adapter is in place."""
        self.__dict__["_state_dict_keys"] = tuple(state_dict or ())
        hooks = own_hooks(model) or RunHooks(move_biases)
        is_new = not any(layer.has_adapter(adapter_name) for layer in hooks.layers)
        try:
            _check_adapter_name(model, adapter_name)
            with undone_on_error(self):
                super().inject_adapter(
                    model,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                    state_dict=state_dict,
                )
        except BaseException:
            if is_new:
                self.peft_config.pop(adapter_name, None)  # PEFT notes it before it looks at the model
            raise
        plan: dict[str, PlannedSite] = self.__dict__["_plan"]
        layers = {layer.name: layer for layer in _layers(model)}
        for layer in layers.values():
            if layer.name not in plan:
                layer.forget(adapter_name)  # of an adapter of this name that was replaced
                continue
            holder = plan[layer.name].router
            if holder is not None:
                layer.routers[adapter_name] = layers[holder].routers[adapter_name]
        hooks.set_layers(list(layers.values()))
        attach_hooks(model, hooks)
        add_tags = getattr(model, "add_model_tags", None)
        if add_tags is not None:
            add_tags(TAGS)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        assert isinstance(peft_config, MoeLoraConfig)
        if getattr(model, "_tp_size", None) not in (None, 0, 1):
            raise TargetError(
                f"{type(model).__name__} is split by tensor parallelism ({model._tp_size} ways); allowed: 1. The "
                "experts would not be split along; load the base model without it."
            )
        plan = plan_sites(model, peft_config)
        marker = f".{PREFIX}"
        named = {key.split(marker)[0] for key in self.__dict__.pop("_state_dict_keys") if marker in key}
        unknown = sorted(name for name in named if name.removeprefix("_orig_mod.") not in plan)
        if unknown:
            raise TargetError(
                f"the adapter's weights name {', '.join(unknown[:8])}, but its configuration does not target it "
                f"(target_modules={peft_config.target_modules!r}). The two files do not belong together."
            )
        self.__dict__["_plan"] = plan
        self.__dict__["_shared"] = {}

    def _check_target_module_exists(self, peft_config: PeftConfig, key: str) -> Any:
        if key in self.__dict__["_plan"]:
            return True
        found = check_target_module_exists(peft_config, key)
        return found if isinstance(found, _ExcludedModule) else False

    def _create_and_replace(
        self,
        peft_config: MoeLoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        planned: PlannedSite = self.__dict__["_plan"][current_key]
        layer: MixtureLinear | MixtureFeedForward
        if isinstance(target, (MixtureLinear, MixtureFeedForward)):
            layer = target
        elif planned.width:
            router = None if planned.base_router is None else self.model.get_submodule(planned.base_router)
            layer = MixtureBlock(target, current_key, planned.width, router)
        elif planned.form is None:
            layer = MixtureLinear(target, current_key)
        elif planned.passing:
            *activation, down = (unwrapped(self.model.get_submodule(name)) for name in planned.passing)
            layer = MixtureSplitFeedForward(target, current_key, planned.form, down, next(iter(activation), None))
            pass_on(self.model, planned.passing, layer)
        else:
            layer = MixtureFeedForward(target, current_key, planned.form)
        if layer is not target:
            layer._active_adapter = self.active_adapter
        site = planned.declare(peft_config, layer.linear_sizes())
        layer.update_layer(adapter_name, peft_config, site, peft_config.inference_mode, self.__dict__["_shared"])
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        super()._mark_only_adapters_as_trainable(model)
        if any(self.peft_config[adapter].bias == "moelora_only" for adapter in self.active_adapters):
            for name in _block_bias_names(model):
                model.get_parameter(name).requires_grad = True

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, torch.Tensor], config: MoeLoraConfig
    ) -> dict[str, torch.Tensor]:
        biases: dict[str, torch.Tensor] = super()._get_learnable_bias_state_dict(model, state_dict, config)
        if config.bias == "moelora_only":
            biases.update({name: state_dict[name] for name in _block_bias_names(model) if name in state_dict})
        return biases

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: MoeLoraConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        weights: dict[str, torch.Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, upgrade_keys(state_dict)
        )
        return checked_weights(model, adapter_name, config, weights)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: MoeLoraConfig, **kwargs: Any) -> dict[str, torch.Tensor]:
        # PEFT asks for the tensors, then writes the configuration
        config.base_fingerprint = fingerprint(model) or config.base_fingerprint
        found: dict[str, torch.Tensor] = super()._get_adapter_state_dict(model=model, config=config, **kwargs)
        return found

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # BaseTuner's version reads `.weight` of what it replaces, which a block does not have; the adapter has been
        # moved to the base layer's device by `update_layer`.
        setattr(parent, child_name, new_module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model with its adapters; facts such as `task_ids` are for the routing, see `batch_facts`."""
        return self._with_facts(self.model, *args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generation by the base model with its adapters; facts are given once for each prompt.

        An adapter that routes by a first pass over all tokens (X-LoRA) generates without a KV cache, whatever
        `use_cache` is: the tokens are the same, at the cost of running the whole sequence for each of them.
        """
        return self._with_facts(self._generate, *args, **kwargs)

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generation whose routing by sequence is decided once, by the prompts."""
        hooks = own_hooks(self.model)
        if hooks is None:
            return self.model.generate(*args, **kwargs)
        names = ("input_ids", "inputs_embeds", "attention_mask")
        inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        first = args[0] if args else kwargs.get("inputs")
        if first is not None:
            inputs.setdefault("input_ids", first)
        if hooks.reads_base_hidden():
            kwargs["use_cache"] = False
        with known_facts(hooks.facts_of_prompts(self.model, inputs)):
            return self.model.generate(*args, **kwargs)

    @staticmethod
    def _with_facts(call: Any, *args: Any, **kwargs: Any) -> Any:
        facts = {name: kwargs.pop(name) for name in FACTS if name in kwargs}
        if not facts:
            return call(*args, **kwargs)
        with batch_facts(**facts):
            return call(*args, **kwargs)

    @classmethod
    def count_trainable_parameters(cls, model: nn.Module, config: MoeLoraConfig) -> int:
        """See `MoeLoraConfig.num_trainable_parameters`.

        Args:
            model: The base model.
            config: The configuration that would be put on it.
        """
        return count_trainable_parameters(model, config)

    def unload(self) -> nn.Module:
        """Return the base model without adapters and hooks."""
        model: nn.Module = super().unload()
        detach_hooks(model)
        tags: list[str] = getattr(model, "model_tags", None) or []
        for tag in TAGS:
            if tag in tags:
                tags.remove(tag)
        return model

    def _check_merge_allowed(self) -> NoReturn:
        raise MergeError(MERGE_REASON)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            MergeError: Always.
        """
        raise MergeError(
            "mixtures of LoRA experts cannot be combined into one adapter: each has a router of its own. Activate "
            "several with `model.base_model.set_adapter([...])` instead; their changes add up."
        )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise AdapterNameError(
                "`adapter_names` picks one adapter per sample and works in eval mode only; call eval()."
            )
        known = set(self.peft_config) | {"__base__"}
        unknown = sorted(set(adapter_names) - known)
        if unknown:
            raise AdapterNameError(f"unknown adapter(s) {unknown}; allowed: {', '.join(sorted(known))}.")
        used = set(adapter_names) - {"__base__"}
        num_beams = kwargs.get("num_beams")
        if isinstance(num_beams, int) and num_beams > 1:
            adapter_names = [name for name in adapter_names for _ in range(num_beams)]
        handles = [
            module.register_forward_pre_hook(
                partial(_pass_adapter_names, adapter_names=adapter_names), with_kwargs=True
            )
            for module in self.modules()
            if isinstance(module, (MixtureLinear, MixtureFeedForward, PassThrough, AuxiliaryTrainingWrapper))
        ]
        try:
            with adapters_of_rows(used):
                yield
        finally:
            for handle in handles:
                handle.remove()


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _layers(model: nn.Module) -> list[MixtureLinear | MixtureFeedForward]:
    # not modules(): those of many adapters are many times as many
    return [module for _, module in base_modules(model) if isinstance(module, (MixtureLinear, MixtureFeedForward))]


def _block_bias_names(model: nn.Module) -> list[str]:
    """Biases of the adapted linears in feed-forward blocks; PEFT sees those of single linears only."""
    biases = {
        id(getattr(layer.linear(role), "bias", None))
        for layer in _layers(model)
        if isinstance(layer, MixtureFeedForward)
        for role in layer.form.linears
        if any(layer.lora_factors(role, adapter) is not None for adapter in layer.configs)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) in biases]


_RESERVED_NAMES = frozenset(
    {"base_model", "model", "base_layer", "weight", "bias", "modules_to_save", "original_module", "token_adapter"}
)


def _check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """PEFT drops every parameter whose path contains the name of another adapter when it saves one, silently."""
    components = {component for name, _ in base_modules(model) for component in name.split(".")}
    reason = unusable_name(adapter_name)
    if reason is not None:
        raise AdapterNameError(
            f"adapter name {str(adapter_name)[:60]!r} {reason}; allowed: a name that a folder can have. PEFT "
            "saves each adapter in a folder of its name."
        )
    if (
        "." in adapter_name
        or adapter_name.startswith((PREFIX, "__"))
        or adapter_name in components | _RESERVED_NAMES
        or hasattr(nn.ModuleDict, adapter_name)
    ):
        raise AdapterNameError(
            f"adapter name {adapter_name!r} has a dot, starts with '{PREFIX}' or '__', or is part "
            f"of a module's path in {type(model).__name__} or of PEFT's; allowed: any other name. PEFT would drop or "
            "mix up parameters when saving."
        )
