"""What all mixture layers share: the containers of the adapters, routing, and the rules of PEFT's layer contract.

Shape suffixes: T tokens, D input features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moelora.choices import Param, Site
from moelora.config import MoeLoraConfig
from moelora.errors import AdapterNameError, MergeError, MoeLoraError
from moelora.experts.base import ExpertInput
from moelora.layers.repeated import not_reentrant, not_repeatable
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import Dense, FrozenFeedForward
from moelora.ops.sparse_dropout import LoraDropout
from moelora.routing.batch import Batch, Tokens
from moelora.routing.decision import Routing
from moelora.routing.prompts import BASE_HIDDEN
from moelora.routing.record import Mixture
from moelora.routing.router import Router
from moelora.routing.run import Place, current_place, in_backward, row_adapters, runs_base_only
from moelora.tensors import AdapterTensors

MERGE_REASON = (
    "a routed mixture of LoRA experts depends on its input, so it cannot be merged into the base weights. Keep the "
    "adapter loaded (it generates with a KV cache like any adapter), or call `unload()` to get the base model back."
)


_NO_BATCH = Batch()


class Here(NamedTuple):
    """Where a layer runs, what the batch says of the tokens it is given, and what tells those tokens from others."""

    place: Place | None
    tokens: Tokens
    key: tuple[Any, ...] | None


class MoeLoraLayer(nn.Module, BaseTunerLayer):
    """Base of the mixture layers: adapters by name, each with the tensors its choices declare.

    The tensors of experts are in a container for each first part of their names ("A.up" in `moelora_A`), those of
    routers in `moelora_router`. PEFT and transformers derive checkpoint keys from exactly one component `moelora_...`
    of a path, and PEFT's optimizers find the factors by `lora_A` and `lora_B` in it.

    Args:
        base_layer: The wrapped module.
        name: Its name in the base model.
    """

    other_param_names: tuple[str, ...] = ("configs", "scaling", "parts", "routers", "sites", "moelora_dropout")

    # PEFT's classes are Any to the type checker, and nn.Module would answer for their attributes with Tensor | Module
    adapter_layer_names: tuple[str, ...]
    base_layer: nn.Module
    moelora_router: Any
    active_adapters: list[str]
    disable_adapters: bool
    get_base_layer: Callable[[], nn.Module]
    set_requires_grad: Callable[[str, bool], None]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[Tensor, torch.dtype], Tensor]
    _move_adapter_to_device_of_base_layer: Callable[[str], None]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.name = name
        self.configs: dict[str, MoeLoraConfig] = {}
        self.scaling: dict[str, float] = {}
        # the modules that hold an adapter's tensors, by the first parts of their names: "A", "B", "router"
        self.parts: dict[str, dict[str, AdapterTensors]] = {}
        # the router of each adapter that routes here; it may be held by another layer, hence no submodule
        self.routers: dict[str, Router] = {}
        # what the choices of each adapter know of the place
        self.sites: dict[str, Site] = {}
        self.moelora_dropout = nn.ModuleDict({})
        self.adapter_layer_names = ()
        for container in ("moelora_A", "moelora_B", "moelora_router"):
            self._container(container)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True

    def _container(self, name: str) -> nn.ModuleDict:
        if name not in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict({}))
            self.adapter_layer_names = (*self.adapter_layer_names, name)
        found: nn.ModuleDict = getattr(self, name)
        return found

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of each linear by its role; "" for a layer of one linear."""
        raise NotImplementedError

    def dense(self) -> Dense:
        """Weight and bias of each frozen linear by its role, as in `linear_sizes`."""
        raise NotImplementedError

    def frozen_block(self) -> FrozenFeedForward | None:
        """The parts of a feed-forward block; None for any other module."""
        return None

    def update_layer(
        self,
        adapter_name: str,
        config: MoeLoraConfig,
        site: Site,
        inference_mode: bool,
        shared: dict[tuple[str, str], AdapterTensors] | None = None,
    ) -> None:
        """Add (or replace) an adapter.

        Args:
            adapter_name: Its name.
            config: Its configuration.
            site: Where the layer is: which linears get experts, and whether there is a router.
            inference_mode: Whether its parameters start frozen.
            shared: What holds the tensors that sites of the adapter share, by key and name; the layer adds what it is
                the first to declare.
        """
        shared = {} if shared is None else shared
        self.forget(adapter_name)
        self.configs[adapter_name] = config
        self.sites[adapter_name] = site
        self.scaling[adapter_name] = config.experts.scaling
        self.moelora_dropout[adapter_name] = LoraDropout(config.experts.lora_dropout)
        declared = config.expert_params(site)
        parts: dict[str, AdapterTensors] = {}
        for first in dict.fromkeys(param.name.partition(".")[0] for param in declared):
            group = [param for param in declared if param.name.partition(".")[0] == first]
            elsewhere = _held(group, shared)
            own = [param for param in group if param.name.rpartition(".")[2] not in elsewhere]
            parts[first] = AdapterTensors(own, elsewhere)
            shared |= {(param.shared, param.name): parts[first] for param in own if param.shared}
        if site.routed and site.owns_router:
            group = config.router_params(site)
            elsewhere = _held(group, shared)
            router = Router(site, config.scores, config.selection, elsewhere)
            parts["router"] = self.routers[adapter_name] = router
            for param in group:
                if param.shared and param.name not in elsewhere:
                    shared[param.shared, param.name] = router
        self.parts[adapter_name] = parts
        for first, part in parts.items():
            self._container(f"moelora_{first}")[adapter_name] = part
        for module in (*parts.values(), self.moelora_dropout[adapter_name]):
            module.train(self.training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        config.experts.start(parts, self.dense)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def forget(self, adapter_name: str) -> None:
        """Drop an adapter's parameters and settings, if it is there; which adapters are active stays as it is."""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            container = getattr(self, attribute)
            if adapter_name in container:
                del container[adapter_name]

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """PEFT calls it wherever it has given tensors their gradients, with the adapters that they are of."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.parts if names is None else names:
            for part in self.parts.get(name, {}).values():
                part.freeze_untrained()

    def lora_factors(self, role: str, adapter: str) -> Factors | None:
        """The low-rank factors of a linear, or None if the adapter has no experts there."""
        experts = self.configs[adapter].experts
        found: Factors | None = experts.factors(self.parts[adapter], role, self.scaling[adapter], self.sites[adapter])
        return found

    def has_adapter(self, adapter: str) -> bool:
        """Whether the layer holds an adapter of that name."""
        return adapter in self.configs

    def is_off(self, adapter: str) -> bool:
        """Whether all experts of an adapter's mixture are switched off, so that it adds nothing."""
        router = self.routers.get(adapter)
        return router is not None and router.is_off

    def mixtures(self) -> dict[Mixture, int]:
        """The active adapters that route here, with their number of experts."""
        if self.disable_adapters:
            return {}
        routed = self.routers
        return {(self.name, a): routed[a].num_experts for a in self.active_adapters if a in routed}

    @property
    def needs_prompts(self) -> bool:
        """Whether any of its adapters routes by a fact of the batch."""
        return any(self.configs[adapter].needs for adapter in self.routers)

    def needs(self) -> frozenset[str]:
        """The facts of the batch that routing of the active adapters cannot do without."""
        return frozenset().union(*(self.configs[adapter].needs for adapter in self._routing_now()))

    def _routing_now(self) -> set[str]:
        active = set(self.active_adapters) | set(row_adapters())
        return set() if self.disable_adapters else active & self.routers.keys()

    def routers_of_base_hidden(self) -> list[tuple[str, Router]]:
        """The routers of the active adapters that look at the base's hidden states before the model runs."""
        return [(a, self.routers[a]) for a in self._routing_now() if BASE_HIDDEN in self.configs[a].scores.needs]

    def expects_balance_loss(self) -> bool:
        """Whether an active adapter that trains is configured with a balance loss, which somebody has to add."""
        configs = [self.configs[adapter] for _, adapter in self.mixtures()]
        return any(config.has_balance_loss and not config.inference_mode for config in configs)

    def route(self, adapter: str, x: Tensor, here: Here) -> Routing:
        """Decide for the T tokens of `x` [..., D]; once for sites of one input that share a router.

        Raises:
            MoeLoraError: See `_decide`.
        """
        place, shares = here.place, self.configs[adapter].placement.routers == "per_input"
        # rows of a batch by themselves are another tensor each time, and a graph must not depend on which tensor it is
        if place is None or not shares or here.key is None or torch.compiler.is_compiling():
            return self._decide(adapter, x, here)
        return place.run.once(adapter, self.routers[adapter], place, x, lambda: self._decide(adapter, x, here))

    def _decide(self, adapter: str, x: Tensor, here: Here) -> Routing:
        """Decide for the T tokens of `x` [..., D].

        Raises:
            MoeLoraError: If checkpointing of another kind than transformers' repeats a layer whose routing depends on
                the batch, which is not known then; or if a router that decided before the layers is to be trained
                under reentrant checkpointing.
        """
        router = self.routers[adapter]
        place, replaced = here.place, None
        bias = router.tensor("bias") if router.has_moving_bias else None
        if place is None and (router.reads_batch or bias is not None) and in_backward():
            raise MoeLoraError(not_repeatable(self.name))
        if place is not None and bias is not None and place.run.grad_enabled:  # else nothing is ever repeated
            biases = place.run.biases
            if not place.repeated:
                biases[self.name, adapter] = bias.detach()
            elif (self.name, adapter) in biases:
                replaced = {"bias": biases[self.name, adapter]}
            elif self.training and self._moves_bias(adapter):
                raise MoeLoraError(not_repeatable(self.name))
        prepared_T = self.prepared_T(adapter, x, here)
        at_entry = bool(here.tokens.prepared)
        loses_gradient = (
            at_entry and prepared_T is not None and prepared_T.requires_grad and not torch.is_grad_enabled()
        )
        if loses_gradient and place is not None and place.run.grad_enabled:
            raise MoeLoraError(not_reentrant(self.name))
        # what looks at the batch alone is the same in every layer of a run; but where a router trains, a layer that
        # checkpointing runs again needs a decision with a gradient
        trains = place is not None and place.run.grad_enabled and self.configs[adapter].scores.is_trained
        can_share = place is not None and here.key is not None and router.is_shared and not trains
        shared = (adapter, *(here.key or ())) if can_share else None
        if place is not None and shared in place.run.decisions:
            return place.run.decisions[shared]
        site_index = self.sites[adapter].index
        found: Routing = router(x.reshape(-1, x.shape[-1]), here.tokens, replaced, prepared_T, site_index)
        if place is not None and shared is not None and not found.weights_TK.requires_grad:
            place.run.decisions[shared] = found
        return found

    def is_low_rank(self, adapter: str) -> bool:
        """Whether an adapter's experts are low-rank factors that the fast operations take."""
        return bool(self.configs[adapter].experts.is_low_rank)

    def forward_applied(self, adapter: str, x: Tensor, here: Here | None, base: Callable[[Tensor], Tensor]) -> Tensor:
        """The output with experts that are no low-rank factors.

        Args:
            adapter: The adapter.
            x: The input [..., D].
            here: Where it is.
            base: The frozen module.
        """
        heard: list[tuple[Routing, Here]] = []

        def route(x_: Tensor, repeats: int = 1) -> Routing:
            assert here is not None
            there = here if repeats == 1 else Here(here.place, here.tokens.repeated(repeats), None)
            heard.append((self.route(adapter, x_, there), there))
            return heard[-1][0]

        tokens = _NO_BATCH.tokens(x) if here is None else here.tokens
        config, dropout = self.configs[adapter], self.moelora_dropout[adapter]
        at_site = self.parts[adapter], self.scaling[adapter], self.sites[adapter]
        given = ExpertInput(x, base, route, *at_site, tokens, dropout, config.compute, self.dense, self.frozen_block())
        y: Tensor = config.experts.apply(given)
        for routing, there in heard:
            y = self.report_routing(adapter, routing, there, y)
        return y

    def sum_of_changes(self, adapters: Sequence[str], x: Tensor, here: Here | None) -> Tensor:
        """The output with an adapter; with several the base's and the sum of what each changes."""
        outputs = [self.forward_one(adapter, x, here) for adapter in adapters]
        if len(outputs) == 1:
            return outputs[0]
        base = self.base_output(x)
        return base + torch.stack([output - base for output in outputs]).sum(0)

    def prepared_T(self, adapter: str, x: Tensor, here: Here) -> Tensor | None:
        """What is made of each token before its router runs, [T, ...]; None if nothing is."""
        return here.tokens.prepared_T(adapter) if here.tokens.prepared else None

    def report_routing(self, adapter: str, routing: Routing, here: Here, output: Tensor) -> Tensor:
        """Let those who listen know of a decision.

        Returns:
            `output`, with the gradient of a balance loss attached where it cannot reach the router otherwise.
        """
        place = here.place
        if place is None:
            return output
        run = place.run
        if place.repeated:
            return run.attach((self.name, adapter), routing, here.tokens.valid_T, output)
        moves_bias = self.training and run.grad_enabled and self._moves_bias(adapter)
        if run.listeners or moves_bias:
            run.record(self.name, adapter, routing, here.tokens.valid_T, moves_bias=moves_bias)
        return output

    def _moves_bias(self, adapter: str) -> bool:
        """Whether an adapter's bias moves in training, by this layer: not that of a frozen adapter."""
        moves = any(choice.moves_bias for choice in self.configs[adapter].balance) and self.sites[adapter].owns_router
        return moves and any(part.is_trained() for part in self.parts[adapter].values())

    def moving_biases(self) -> dict[Mixture, Tensor]:
        """The biases that move after a training forward, of the active adapters."""
        moving = [mixture for mixture in self.mixtures() if self.training and self._moves_bias(mixture[1])]
        return {mixture: self.routers[mixture[1]].tensor("bias") for mixture in moving}

    def forward_active(self, x: Tensor, here: Here | None) -> Tensor:
        """The output with the active adapters; `here` is None if none of the layer's adapters has a router."""
        raise NotImplementedError

    def forward_one(self, adapter: str, x: Tensor, here: Here | None) -> Tensor:
        """The output with one adapter."""
        raise NotImplementedError

    def base_output(self, x: Tensor) -> Tensor:
        """The output without any adapter, of the same shape as with one."""
        output: Tensor = self.base_layer(x)
        return output

    def is_active(self, adapter_names: list[str] | None) -> bool:
        """Whether the next forward takes an adapter into account.

        Args:
            adapter_names: The adapter of each sample of the batch, if there is one for each.
        """
        if self.disable_adapters or runs_base_only():
            return False
        if adapter_names is not None:
            return True
        for adapter in self.active_adapters:  # noqa: SIM110 - every layer asks, and any() costs three times as much
            if adapter in self.configs:
                return True
        return False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The wrapped module with its active adapters; `adapter_names` picks one for each sample of the batch."""
        adapter_names = kwargs.pop("adapter_names", None)
        if not self.is_active(adapter_names):
            return self.base_layer(x, *args, **kwargs)
        if args or kwargs:
            raise MoeLoraError(
                f"{self.name!r} was called with more than its input ({len(args)} further arguments, keywords "
                f"{sorted(kwargs)}); allowed: the input alone. Leave it out with exclude_modules."
            )
        here = None
        if self.routers:
            place = current_place()
            batch = _NO_BATCH if place is None else place.batch
            here = Here(place, batch.tokens(x), (id(batch), x.shape[:-1]))
        if adapter_names is not None:
            return self._forward_mixed(x, here, adapter_names)
        return self.forward_active(x, here)

    def _forward_mixed(self, x: Tensor, here: Here | None, adapter_names: list[str]) -> Tensor:
        place, given = current_place(), x
        x = x if place is None else x.view(*place.batch.leading(x), x.shape[-1])
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
                of_rows = None if here is None else Here(here.place, here.tokens.rows(rows), None)
                parts.append(self.forward_one(name, x[rows], of_rows))
        order = torch.tensor([row for rows in groups.values() for row in rows], device=x.device)
        y = torch.cat(parts)[order.argsort()]
        return y.view(*given.shape[:-1], y.shape[-1])

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
            self.scaling[adapter] = scale * self.configs[adapter].experts.scaling


def _held(params: list[Param], shared: dict[tuple[str, str], AdapterTensors]) -> dict[str, AdapterTensors]:
    """What holds those of the tensors that a site before has declared, by the last parts of their names."""
    known = {param.name: (param.shared, param.name) for param in params if param.shared}
    return {name.rpartition(".")[2]: shared[key] for name, key in known.items() if key in shared}
