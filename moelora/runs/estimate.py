"""What a run will need, from the base model's config.json alone: sizes, memory and operations.

The base model runs once without weights and without data (torch's meta device), forward and backward, while its
operations are counted and what it keeps for the backward pass is noted. What the adapter adds is worked out from its
sites: the layers of mixtures cannot run without data, since their experts' shares of the tokens depend on it.
"""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from moelora.errors import RunError
from moelora.layers.base import MoeLoraLayer
from moelora.runs.config import RunConfig, adapter_config
from moelora.runs.models import load_skeleton
from moelora.runs.parameters import ParameterCount, count_parameters
from moelora.runs.trainer_arguments import trainer_arguments

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Forward and backward of a weight of the adapter on a token: 2 for the output, 2 for each of the two gradients.
_ADAPTER_FLOPS = 6


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a training run needs on one device.

    Attributes:
        parameters: Sizes of the adapter and the base.
        sequences: Sequences of a micro-batch.
        length: Tokens of each.
        micro_batches: Those of an optimizer step.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: Name of the optimizer.
        memory: Bytes by what they are for. Kernels' scratch memory and the allocator's waste come on top.
        flops: Floating-point operations of an optimizer step, a multiplication and an addition counted as two.
    """

    parameters: ParameterCount
    sequences: int
    length: int
    micro_batches: int
    checkpointing: bool
    optimizer: str
    memory: dict[str, int]
    flops: int

    def to_json(self) -> dict[str, Any]:
        """As a mapping, with the sum of the memory."""
        words = dataclasses.asdict(self)
        return {**words, "memory": {**self.memory, "sum": sum(self.memory.values())}}


def estimate(config: RunConfig, length: int | None = None) -> Estimate:
    """Estimate what a run needs.

    Args:
        config: The run.
        length: Tokens of a sequence; None for `training.max_length`.

    Raises:
        MoeLoraError: If the adapter does not fit the model, or the length is not known.
    """
    if config.recipe not in ("sft", "sequential"):
        raise RunError(f"recipe is {config.recipe!r}; allowed: sft, sequential. Other steps run other forwards.")
    adapter = adapter_config(config)
    training = trainer_arguments(config.recipe, config.training, Path(config.output_dir))
    length = training.max_length if length is None else length
    if length is None or length < 1:
        raise RunError(
            f"the length of a sequence is {length}; allowed: at least 1. Give --length, or training.max_length."
        )
    skeleton = load_skeleton(config)
    parameters = count_parameters(skeleton, adapter)
    stored = sum(p.numel() for name, p in skeleton.named_parameters() if "moelora_" in name)
    base = load_skeleton(config)
    traced = _trace(base, _sites(skeleton), training.per_device_train_batch_size, length)
    tokens = training.per_device_train_batch_size * length
    of_adapter = _BYTES[_adapter_dtype(config)]
    states = _optimizer_bytes(training.optim, of_adapter)
    checkpointing = bool(training.activation_checkpointing)
    # on linears all experts are computed and the others masked, on blocks only those that are chosen
    computed = parameters.active if adapter.placement.kind == "feed_forward" else stored
    flops = traced.flops + (traced.forward_flops if checkpointing else 0) + _ADAPTER_FLOPS * computed * tokens
    return Estimate(
        parameters=parameters,
        sequences=training.per_device_train_batch_size,
        length=length,
        micro_batches=training.gradient_accumulation_steps,
        checkpointing=checkpointing,
        optimizer=str(getattr(training.optim, "value", training.optim)),
        memory={
            "base": _base_bytes(base, config),
            "adapter": stored * of_adapter,
            "gradients": parameters.trainable * of_adapter,
            "optimizer": parameters.trainable * states,
            "activations": traced.kept(checkpointing, _BYTES[config.dtype]),
        },
        flops=flops * training.gradient_accumulation_steps,
    )


def _adapter_dtype(config: RunConfig) -> str:
    """PEFT takes float32 where the base has less."""
    return {"auto": "float32", "base": config.dtype}.get(config.adapter_dtype, config.adapter_dtype)


def _optimizer_bytes(optim: Any, of_parameter: int) -> int:
    """Bytes of the optimizer's state for a trained parameter: two numbers as Adam has, or none of plain SGD."""
    name = str(getattr(optim, "value", optim))
    if name == "sgd":
        return 0
    return 2 if "8bit" in name else 2 * of_parameter


def _base_bytes(base: Any, config: RunConfig) -> int:
    """Bytes of the base's weights; quantised are its linears but the head, with a scale for each 64 weights."""
    quantised = config.model_kwargs.get("quantization_config") or {}
    bits = 4.5 if quantised.get("load_in_4bit") else 8 if quantised.get("load_in_8bit") else None
    head = base.get_output_embeddings()
    linears = [m for m in base.modules() if isinstance(m, nn.Linear) and m is not head] if bits is not None else []
    small = sum(linear.weight.numel() for linear in linears)
    total = sum(parameter.numel() for parameter in base.parameters())
    return (total - small) * _BYTES[config.dtype] + math.ceil(small * (bits or 0) / 8)


def _sites(wrapped: nn.Module) -> dict[str, int]:
    """The modules that the adapter wraps, by name: how many numbers of its own each keeps of a token.

    The hidden activations of the experts of a feed-forward mixture are made again in the backward pass.
    """
    found = {}
    for name, layer in wrapped.named_modules():
        if isinstance(layer, MoeLoraLayer):
            tensors = [p for key, p in layer.named_parameters() if "moelora_A" in key]
            ranks = sum(p.numel() // p.shape[-1] for p in tensors if p.ndim > 1)
            # of a mixture the inner features, the weights spread over them, and the product of both
            found[name] = 3 * ranks if layer.routers else ranks
    return found


@dataclass(eq=False)
class _Traced:
    """What one forward and backward pass of the base keeps and computes.

    Attributes:
        outside: Bytes kept outside of the layers that can be checkpointed.
        layers: Bytes kept in each of these.
        inputs: Bytes of their inputs.
        forward_flops, flops: Operations of the forward pass, and of both.
    """

    outside: int = 0
    layers: dict[str, int] = field(default_factory=dict)
    inputs: int = 0
    forward_flops: int = 0
    flops: int = 0

    def kept(self, checkpointing: bool, width: int) -> int:
        """Bytes kept at most, in a base whose numbers are as wide as `width` bytes; it was traced in float32.

        The head and the loss are in float32 whatever the base is.
        """
        layers = self.inputs + max(self.layers.values(), default=0) if checkpointing else sum(self.layers.values())
        return layers * width // 4 + self.outside


def _trace(base: Any, sites: dict[str, int], sequences: int, length: int) -> _Traced:
    """Run the base once without data, and note what it keeps for the backward pass.

    Args:
        base: The base on the meta device.
        sites: What an adapter wraps of it.
        sequences: Sequences at once.
        length: Tokens of each.
    """
    found = _Traced()
    base.requires_grad_(False)
    base.get_input_embeddings().weight.requires_grad_(True)  # as the first adapter has it: gradients reach the bottom
    parameters = {parameter.untyped_storage()._cdata for parameter in base.parameters()}
    seen: dict[int, Tensor] = {}  # holds the tensors, so that no storage is taken for another one
    layer: list[str] = []

    def keep(num_bytes: int) -> None:
        if layer:
            found.layers[layer[-1]] = found.layers.get(layer[-1], 0) + num_bytes
        else:
            found.outside += num_bytes

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters and storage._cdata not in seen:
            seen[storage._cdata] = tensor
            keep(storage.nbytes())
        return tensor

    def note_input(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        note(inputs[0])  # the gradient of A needs it

    def enter_site(features: int, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        keep(x.numel() // x.shape[-1] * features * x.element_size())

    def enter_layer(name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.inputs += sum(x.numel() * x.element_size() for x in inputs if isinstance(x, Tensor))
        layer.append(name)

    def leave_layer(*_: Any) -> None:
        layer.pop()

    with ExitStack() as stack:
        for name, module in base.named_modules():
            hooks: list[Any] = []
            if isinstance(module, GradientCheckpointingLayer):
                hooks.append(module.register_forward_pre_hook(partial(enter_layer, name)))
                hooks.append(module.register_forward_hook(leave_layer))
            if name in sites:
                hooks.append(module.register_forward_pre_hook(partial(enter_site, sites[name])))
                linears = [each for each in module.modules() if isinstance(each, nn.Linear)]
                hooks += [linear.register_forward_pre_hook(note_input) for linear in linears]
            for hook in hooks:
                stack.callback(hook.remove)
        ids = torch.zeros(sequences, length, dtype=torch.long, device="meta")
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                # with a cache, without which transformers looks at the values for packed rows
                loss = base(input_ids=ids, labels=ids, use_cache=True).loss
            found.forward_flops = counter.get_total_flops()
            loss.backward()
            found.flops = counter.get_total_flops()
    return found
