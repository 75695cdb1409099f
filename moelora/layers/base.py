"""What all mixture layers share: the containers of the adapters, routing, and the rules of PEFT's layer contract.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S tokens, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moelora.config import ComputeConfig, ExpertsConfig, MoeLoraConfig
from moelora.errors import AdapterNameError, MergeError, MoeLoraError
from moelora.experts.stack import ExpertStack, init_a, init_b
from moelora.ops.factors import Factors
from moelora.routing.decision import Routing
from moelora.routing.recorder import RoutingRecorder
from moelora.routing.router import Router

MERGE_REASON = (
    "a routed mixture of LoRA experts depends on its input, so it cannot be merged into the base weights. Keep the "
    "adapter loaded (it generates with a KV cache like any adapter), or call `unload()` to get the base model back."
)


class MoeLoraLayer(nn.Module, BaseTunerLayer):
    """Base of the mixture layers: adapters by name, each with stacked experts and (unless un-routed) a router.

    Subclasses name their expert stacks in `adapter_layer_names` (one attribute a factor, all starting with `moelora_`,
    since PEFT and transformers derive checkpoint keys from exactly one such path component).

    Args:
        base_layer: The wrapped module.
        name: Its name in the base model.
        recorder: The model's routing recorder.
    """

    other_param_names: tuple[str, ...] = ("experts", "scaling", "compute", "moelora_dropout")

    # PEFT's classes are Any to the type checker, and nn.Module would answer for their attributes with Tensor | Module
    adapter_layer_names: tuple[str, ...]
    base_layer: nn.Module
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_adapter: Callable[..., None]
    set_requires_grad: Callable[[str, bool], None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.name = name
        self.stream = "decoder" if "decoder" in name.split(".") else "main"
        self.recorder = recorder
        self.experts: dict[str, ExpertsConfig] = {}
        self.scaling: dict[str, float] = {}
        self.compute: dict[str, ComputeConfig] = {}
        self.moelora_dropout = nn.ModuleDict({})
        self.moelora_router: nn.ModuleDict
        for attribute in self.adapter_layer_names:
            setattr(self, attribute, nn.ModuleDict({}))
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear by its role; "" for a layer of one linear."""
        raise NotImplementedError

    def update_layer(
        self, adapter_name: str, config: MoeLoraConfig, roles: Iterable[str], routed: bool, inference_mode: bool
    ) -> None:
        """Add (or replace) an adapter.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            roles: The linears that get experts, of `linears()`.
            routed: Whether there is a router; without one the layer has one expert, ordinary LoRA.
            inference_mode: Whether its parameters start frozen.
        """
        self.forget(adapter_name)
        experts = config.experts
        num_experts = experts.num_experts if routed else 1
        self.experts[adapter_name] = experts
        self.scaling[adapter_name] = experts.scaling
        self.compute[adapter_name] = config.compute
        dropout = nn.Dropout(experts.lora_dropout) if experts.lora_dropout > 0 else nn.Identity()
        self.moelora_dropout[adapter_name] = dropout
        sizes = self.linears()
        for role in roles:
            in_features, out_features = sizes[role]
            a, b = self.factors(role)
            a[adapter_name] = ExpertStack(num_experts, experts.r, in_features)
            b[adapter_name] = ExpertStack(num_experts, out_features, experts.r)
            init_a(a[adapter_name], experts)  # type: ignore[arg-type]
            init_b(b[adapter_name])  # type: ignore[arg-type]
        if routed:
            self.moelora_router[adapter_name] = Router(self.router_features(), num_experts, config.routing)
        for attribute in (*self.adapter_layer_names, "moelora_dropout"):
            container = getattr(self, attribute)
            if adapter_name in container:
                container[adapter_name].train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forget(self, adapter_name: str) -> None:
        """Drop an adapter's parameters and settings, if it is there; which adapters are active stays as it is."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]

    def factors(self, role: str) -> tuple[nn.ModuleDict, nn.ModuleDict]:
        """The containers of A and B of a linear, keyed by adapter."""
        infix = f"{role}_" if role else ""
        return getattr(self, f"moelora_{infix}A"), getattr(self, f"moelora_{infix}B")

    def pair(self, role: str, adapter: str) -> tuple[Tensor, Tensor] | None:
        """A [E, R, in] and B [E, out, R] of a linear, or None if the adapter has no experts there."""
        a, b = self.factors(role)
        return (a[adapter].weight, b[adapter].weight) if adapter in a else None  # type: ignore[return-value]

    def lora_factors(self, role: str, adapter: str) -> Factors | None:
        """The experts of an adapter on a linear, or None if it has none there."""
        pair = self.pair(role, adapter)
        return None if pair is None else Factors(*pair, self.scaling[adapter])

    def router_features(self) -> int:
        """Features of the router's input."""
        raise NotImplementedError

    def has_adapter(self, adapter: str) -> bool:
        """Whether the layer holds an adapter of that name."""
        return adapter in self.experts

    def route(self, adapter: str, x: Tensor, valid_BS: Tensor) -> Routing:
        """Decide for the T tokens of `x` [..., D]."""
        router: Router = self.moelora_router[adapter]  # type: ignore[assignment]
        return router(x.reshape(-1, x.shape[-1]), valid_BS)

    def forward_active(self, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The output with the active adapters; `valid_BS` is None if none of the layer's adapters has a router."""
        raise NotImplementedError

    def forward_one(self, adapter: str, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The output with one adapter."""
        raise NotImplementedError

    def base_output(self, x: Tensor) -> Tensor:
        """The output without any adapter, of the same shape as with one."""
        output: Tensor = self.base_layer(x)
        return output

    def at_work(self, adapter_names: list[str] | None) -> bool:
        """Whether the next forward takes an adapter into account.

        Args:
            adapter_names: The adapter of each sample of the batch, if there is one for each.
        """
        if self.disable_adapters:
            return False
        return adapter_names is not None or any(map(self.has_adapter, self.active_adapters))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module with its active adapters; `adapter_names` picks one for each sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if not self.at_work(adapter_names):
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            raise MoeLoraError(
                f"{self.name!r} was called with more than its input ({len(args)} further arguments, keywords "
                f"{sorted(kwargs)}); allowed: the input alone. Leave it out with exclude_modules."
            )
        valid_BS = self.recorder.valid_BS(self, x) if self.moelora_router else None
        if adapter_names is not None:
            return self._forward_mixed(x, valid_BS, adapter_names)
        return self.forward_active(x, valid_BS)

    def _forward_mixed(self, x: Tensor, valid_BS: Tensor | None, adapter_names: list[str]) -> Tensor:
        if len(adapter_names) != len(x):
            raise AdapterNameError(
                f"`adapter_names` has {len(adapter_names)} names for a batch of {len(x)}; allowed: one for each sample."
            )
        groups: dict[str, list[int]] = {}
        for row, name in enumerate(adapter_names):
            groups.setdefault(name if self.has_adapter(name) else "__base__", []).append(row)
        parts = []
        for name, rows in groups.items():
            if name == "__base__":
                parts.append(self.base_output(x[rows]))
            else:
                parts.append(self.forward_one(name, x[rows], None if valid_BS is None else valid_BS[rows]))
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        return torch.cat(parts)[order.argsort()]

    def __repr__(self) -> str:
        return "moelora." + super().__repr__()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Refused.

        Raises:
            MergeError: Always.
        """
        raise MergeError(MERGE_REASON)

    def unmerge(self) -> NoReturn:
        """Refused: nothing is ever merged.

        Raises:
            MergeError: Always.
        """
        raise MergeError("there is nothing to unmerge: " + MERGE_REASON)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Multiply an adapter's scaling by `scale` (of what it was configured with)."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.experts[adapter].scaling
