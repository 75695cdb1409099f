"""From a base and an adapter to the list of a native MoE's tensors, each with what computes it.

Nothing is computed here, but everything is checked: an adapter that does not fit its base is refused before a byte is
written.

Shape suffixes: E experts, F inner features of a block, D model features, O output features, I input features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moelora.errors import ExportError
from moelora.export.native_moe.adapter import SavedAdapter
from moelora.export.native_moe.base import BaseWeights
from moelora.export.native_moe.routing import MoeRouting
from moelora.export.native_moe.targets import SHARED_EXPERT_SIZE, Target, head_dim
from moelora.export.safetensors_writer import Planned

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_IN_BLOCK = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down|gate_up)_proj\.weight")
_FUSED_QKV = ".self_attn.qkv_proj.weight"


@dataclass(frozen=True)
class Plan:
    """The tensors to write.

    Attributes:
        tensors: In the order of the layers.
        unrouted_layers: Layers without a mixture.
        tied: Whether the head is the embedding.
    """

    tensors: list[Planned]
    unrouted_layers: list[int]
    tied: bool


def plan_tensors(base: BaseWeights, adapter: SavedAdapter, target: Target, routing: MoeRouting) -> Plan:
    """List the tensors of the native MoE.

    Raises:
        ExportError: If the adapter does not fit the base, or the target has no place for something of it.
    """
    return _Planner(base, adapter, target, routing).plan()


class _Planner:
    def __init__(self, base: BaseWeights, adapter: SavedAdapter, target: Target, routing: MoeRouting) -> None:
        self.base, self.adapter, self.target, self.routing = base, adapter, target, routing
        self.layers = range(base.config.num_hidden_layers)
        self.blocks = [f"model.layers.{i}.mlp" for i in self.layers]
        self.fused = f"{self.blocks[0]}.gate_up_proj.weight" in base.shapes
        self.unrouted = [i for i in self.layers if self.blocks[i] not in adapter.modules]
        # a change of either parts them, but for rows of tokens, which PEFT trains together
        changed = {_HEAD, _EMBEDDING} & (adapter.besides.keys() | {f"{module}.weight" for module in adapter.modules})
        self.tied = bool(base.config.tie_word_embeddings) and not changed and _HEAD not in adapter.tokens

    def plan(self) -> Plan:
        self._check_fit()
        tensors: list[Planned] = []
        done: set[str] = set()
        for name in sorted(self.base.shapes, key=_in_order):
            found = _IN_BLOCK.fullmatch(name)
            if found is None:
                tensors += self._plain(name)
            elif found[1] not in done:
                done.add(found[1])
                tensors += self._block(int(found[1]))
        if _HEAD not in self.base.shapes:
            tensors += self._plain(_HEAD)
        return Plan(tensors, self.unrouted, self.tied)

    def _check_fit(self) -> None:
        """Every tensor of the adapter has a place of its shape."""
        adapter, shapes = self.adapter, self.base.shapes
        for module in adapter.modules:
            if module in self.blocks:
                adapter.check_router(module)
                self._check_block(module)
            elif adapter.is_routed(module) and f"{module}.weight" in shapes:
                raise ExportError(
                    f"the linear {module!r} has a mixture of its own; allowed: mixtures of whole feed-forward blocks, "
                    "and plain LoRA elsewhere (placement.unrouted_modules='rest'). A native MoE routes nothing else."
                )
            else:
                weight = f"{module}.weight"
                self._check_factors(module, "", self._shape(weight) if weight in shapes or weight == _HEAD else None)
        for name, shape in adapter.besides.items():
            if name != _HEAD and name not in shapes:
                raise self._misfit(f"it holds {name!r} whole, which the base does not have")
            if shape != self._shape(name):
                raise self._misfit(f"{name} is {list(shape)} in it and {list(self._shape(name))} in the base")
        for name in adapter.tokens:
            if name not in shapes:
                raise self._misfit(f"it trains tokens of {name!r}, which the base does not have")
        if adapter.tokens and self.base.config.tie_word_embeddings and not self.tied:
            raise ExportError(
                "the adapter trains tokens of an embedding that is tied to the head, and one of the two otherwise as "
                "well; allowed: one or the other. What is trained of both cannot be told apart."
            )
        if len(self.unrouted) == len(self.layers):
            raise ExportError(
                "no layer of the adapter has a mixture, so there is nothing to route; allowed: a mixture in the "
                "feed-forward blocks. Plain LoRA merges into a dense model."
            )
        if self.unrouted and not self.target.has_dense_layers and not self.routing.renormalize:
            raise ExportError(
                f"layers {self.unrouted} have no mixture and the weights are not renormalised; allowed: a mixture in "
                f"each layer, or renormalize=True. {self.target.architecture} has a mixture in every layer, and equal "
                "experts give the dense block only with weights that sum to one."
            )

    def _check_block(self, block: str) -> None:
        E, D = self.routing.num_experts, self.base.config.hidden_size
        found = self.adapter.modules[block]["router.weight"]
        if found != (E, D):
            raise self._misfit(f"the router of {block!r} is {list(found)} and should be {[E, D]}")
        for role in ("gate", "up", "down"):
            if self.adapter.factor_shapes(block, role) is not None:
                if self.fused and role == "gate":
                    raise self._misfit(f"{block!r} has experts on its gate, which the base has in one linear with up")
                self._check_factors(block, role, self._shape(self._weight_name(block, role)))

    def _check_factors(self, module: str, role: str, shape: tuple[int, ...] | None) -> None:
        if shape is None or len(shape) != 2:
            raise self._misfit(f"it adapts {module!r}, which is no linear of the base")
        factors = self.adapter.factor_shapes(module, role)
        if factors is None:
            raise self._misfit(f"{module!r} has the tensors {sorted(self.adapter.modules[module])}")
        (_, r_a, I), (E, O, r_b) = factors
        expected = self.routing.num_experts if role else 1
        if shape != (O, I) or r_a != r_b or expected != E:
            where = f"{module}.{role}" if role else module
            raise self._misfit(
                f"A and B of {where} are {[list(f) for f in factors]}, against {list(shape)} of the base"
            )

    def _misfit(self, reason: str) -> ExportError:
        return ExportError(
            f"the adapter {self.adapter.source!r} does not fit the base model: {reason}. Allowed: the base that it was "
            f"trained on; its configuration names {self.adapter.config.base_model_name_or_path!r}."
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.base.shapes[_EMBEDDING if name == _HEAD and name not in self.base.shapes else name]

    # what is not in a feed-forward block

    def _plain(self, name: str) -> Iterator[Planned]:
        shape = self._shape(name)
        if not name.endswith(_FUSED_QKV):
            yield Planned(name, shape, lambda: self._value(name))
            return
        heads, width = self.base.config.num_attention_heads, head_dim(self.base.config)
        pairs = self.base.config.num_key_value_heads
        sizes = {"q": heads * width, "k": pairs * width, "v": pairs * width}
        first = 0
        for letter, size in sizes.items():
            rows = slice(first, first + size)
            split = name.replace(_FUSED_QKV, f".self_attn.{letter}_proj.weight")
            yield Planned(split, (size, shape[1]), lambda rows=rows: self._value(name)[rows])  # type: ignore[misc]
            first += size

    def _value(self, name: str) -> Tensor:
        """A tensor of the base as the adapter leaves it."""
        adapter, module = self.adapter, name.removesuffix(".weight")
        if name in adapter.besides:
            return adapter.beside(name)
        weight = self.base.tensor(_EMBEDDING if name == _HEAD and name not in self.base.shapes else name)
        embedding = _EMBEDDING if name == _HEAD and self.tied else name
        if embedding in adapter.tokens:
            tokens, rows = adapter.rows(embedding)
            weight = weight.float().index_copy(0, torch.tensor(tokens), rows.float())
        factors = adapter.factors(module, "") if module in adapter.modules else None
        if factors is None:
            return weight
        return merged(weight, factors.a_ERD[0], factors.b_EOR[0], factors.scaling)

    # feed-forward blocks

    def _weight_name(self, block: str, role: str) -> str:
        return f"{block}.{'gate_up' if self.fused and role in ('gate', 'up') else role}_proj.weight"

    def _linear(self, block: str, role: str, expert: int | None) -> Tensor:
        """The weight of a block's linear as an expert has it; of the base without one."""
        weight = self.base.tensor(self._weight_name(block, role))
        in_adapter = "up" if self.fused and role == "gate" else role
        factors = None if expert is None else self.adapter.factors(block, in_adapter)
        if factors is not None:
            assert expert is not None
            a_RI = factors.expanded_a_ERD()[expert]
            weight = merged(weight, a_RI, factors.b_EOR[expert], factors.scaling)
        if self.fused and role != "down":
            gate, up = weight.chunk(2)
            return gate if role == "gate" else up
        return weight

    def _block(self, layer: int) -> Iterator[Planned]:
        target, block, prefix = self.target, self.blocks[layer], f"model.layers.{layer}."
        D, F = self.base.config.hidden_size, self.base.config.intermediate_size
        E = self.routing.num_experts
        shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        routed = layer not in self.unrouted
        if not routed and target.has_dense_layers:
            for role, shape in shapes.items():
                yield Planned(f"{block}.{role}_proj.weight", shape, _bind(self._linear, block, role, None))
            return
        router = _bind(self.adapter.tensor, block, "router.weight") if routed else _zeros(E, D)
        yield Planned(prefix + target.router, (E, D), router)
        which = range(E) if routed else [None] * E
        if target.is_stacked:
            yield Planned(
                prefix + target.experts["gate_up"], (E, 2 * F, D), lambda: self._stacked(block, which, "gate", "up")
            )
            yield Planned(prefix + target.experts["down"], (E, D, F), lambda: self._stacked(block, which, "down"))
        else:
            for e, expert in enumerate(which):
                for role, name in target.experts.items():
                    made = _bind(self._linear, block, role, expert)
                    yield Planned(prefix + name.format(e=e), shapes[role], made)
        if target.has_shared_expert:
            yield from self._shared_expert(prefix)

    def _stacked(self, block: str, which: range | list[None], *roles: str) -> Tensor:
        return torch.stack([torch.cat([self._linear(block, role, e) for role in roles]) for e in which])

    def _shared_expert(self, prefix: str) -> Iterator[Planned]:
        """One that adds nothing. Its gate is not 0: llama.cpp computes a sigmoid as silu(x) / x."""
        D = self.base.config.hidden_size
        size = min(SHARED_EXPERT_SIZE, self.base.config.intermediate_size)
        for role, shape in (("gate", (size, D)), ("up", (size, D)), ("down", (D, size))):
            yield Planned(f"{prefix}mlp.shared_expert.{role}_proj.weight", shape, _zeros(*shape))
        yield Planned(f"{prefix}mlp.shared_expert_gate.weight", (1, D), lambda: torch.ones(1, D))


def merged(weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scaling: float) -> Tensor:
    """`W + scaling * B A`, computed in fp32."""
    return torch.addmm(weight_OI.float(), b_OR.float(), a_RI.float(), alpha=scaling)


def _zeros(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.zeros(shape)


def _bind(function: Callable[..., Tensor], *args: object) -> Callable[[], Tensor]:
    return lambda: function(*args)


def _in_order(name: str) -> tuple[int, str]:
    """Embedding, layers by number, the rest."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return (int(found[1]) if found else -1 if name == _EMBEDDING else 1_000_000, name)
