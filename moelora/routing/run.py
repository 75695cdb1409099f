"""Where in a run of the model a layer is: the batch it works on, and who listens.

The run is local to the thread and to the call. Hooks on the base model, and on every part of it that is a model of its
own (a backbone, an encoder), open it and close it, so layers find it whichever of them is called. Gradient
checkpointing runs layers again during the backward pass; it gets their place handed along in its own closure, so
nothing is remembered from one forward to the next.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moelora.errors import ConfigError, MoeLoraError
from moelora.routing.batch import FACTS, Batch
from moelora.routing.prompts import BASE_HIDDEN, derive, is_derived, is_prompt_mean
from moelora.routing.record import Mixture, ModelRun, RoutingListener

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_moelora_hooks"
_CHECKPOINTING = "_gradient_checkpointing_func"

_V = TypeVar("_V")


class _Local(Generic[_V]):
    """A context variable that code under `torch.compile` can use too; there it is a plain attribute.

    What was set while tracing is read as an attribute until the default is set again, since a graph may break between.

    Args:
        name: Its name.
        default: Its value outside.
        set_outside: Whether code that is traced reads what was set outside of it. Else threads that are not compiled
            leave the attribute alone.
    """

    def __init__(self, name: str, default: _V, *, set_outside: bool) -> None:
        self._variable: ContextVar[_V] = ContextVar(name, default=default)
        self._default = self._plain = default
        self._set_outside = set_outside
        self._traced = False

    def get(self) -> _V:
        return self._plain if self._traced or torch.compiler.is_compiling() else self._variable.get()

    def set(self, value: _V) -> None:
        if torch.compiler.is_compiling():
            self._plain = value
            self._traced = value is not self._default
            return
        if self._set_outside or self._traced:
            self._plain, self._traced = value, False
        self._variable.set(value)


@dataclass(frozen=True, eq=False)
class Place:
    """Where in a run a layer is.

    Attributes:
        run: The run.
        batch: The batch of the innermost model around the layer.
        module: That model.
        outer: The place of the model around it, or of a run that called this one.
        repeated: Whether checkpointing runs the layer again, in the backward pass.
        base_only: Whether the base model runs for itself, before a forward that routes by what it gives.
    """

    run: ModelRun
    batch: Batch
    module: nn.Module
    outer: Place | None
    repeated: bool = False
    base_only: bool = False


_PLACE: _Local[Place | None] = _Local("moelora_place", None, set_outside=False)
_LISTENERS: _Local[tuple[tuple[Any, RoutingListener], ...]] = _Local("moelora_listeners", (), set_outside=True)
_FACTS: _Local[dict[str, Any]] = _Local("moelora_facts", {}, set_outside=True)
_ROWS: _Local[tuple[str, ...]] = _Local("moelora_rows", (), set_outside=True)
_NOWHERE = nn.Module()


current_place = _PLACE.get
"""Where the running layer is, a `Place`; None outside a run."""

row_adapters = _ROWS.get
"""The adapters that `adapter_names` gives to the rows of the batch; empty without it."""


@contextmanager
def adapters_of_rows(names: Iterable[str]) -> Iterator[None]:
    """Say which adapters the rows of the batches inside use."""
    before = _ROWS.get()
    _ROWS.set(tuple(names))
    try:
        yield
    finally:
        _ROWS.set(before)


def runs_base_only() -> bool:
    """Whether the base model runs without adapters, for routing by what it gives."""
    place = current_place()
    return place is not None and place.base_only


def in_backward() -> bool:
    """Whether this is a backward pass, where a layer can only be running again for checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


@contextmanager
def batch_facts(**facts: Any) -> Iterator[None]:
    """Give the forwards inside what routing may need beside the model's inputs.

    A forward takes them as arguments too, `model(input_ids=..., task_ids=...)`, except that PEFT's classes for a task
    type drop an argument of the name `task_ids`.

    Args:
        **facts: `task_ids` [B] and `instance_embedding` [B, D], one for each sequence of the batch (of each packed
            sequence, if rows hold several). In generation one for each prompt.

    Raises:
        ConfigError: For another name.
    """
    unknown = sorted(set(facts) - set(FACTS))
    if unknown:
        raise ConfigError(f"unknown fact(s) {unknown} of a batch; allowed: {', '.join(FACTS)}.")
    with known_facts({name: torch.as_tensor(value) for name, value in facts.items() if value is not None}):
        yield


@contextmanager
def known_facts(facts: Mapping[str, Tensor]) -> Iterator[None]:
    """The same for facts of any name, those that are derived of prompts among them."""
    before = _FACTS.get()
    _FACTS.set({**before, **facts})
    try:
        yield
    finally:
        _FACTS.set(before)


class RunHooks:
    """The hooks of one base model that open and close its runs.

    Args:
        when_done: Called with these hooks and each run in training that has ended without an error.

    Attributes:
        layers: The model's mixture layers: the fixed list that totals and updates are keyed by.
        derives: Whether any of their adapters routes by what is derived of prompts; most do not, and pay nothing.
        names: Names of the model ("") and of its parts that are models of their own.
    """

    def __init__(self, when_done: Callable[[RunHooks, ModelRun], None]) -> None:
        self.when_done = when_done
        self.layers: list[Any] = []
        self.derives = False
        self.names: dict[nn.Module, str] = {}
        self.checkpointed: list[nn.Module] = []
        self.warned = False

    def set_layers(self, layers: list[Any]) -> None:
        """Say which mixture layers the model has, whenever an adapter was added."""
        self.layers = layers
        self.derives = any(layer.needs_prompts for layer in layers)

    def mixtures(self) -> dict[Mixture, int]:
        """The mixtures of the active adapters, with their number of experts: the same whatever runs in a forward."""
        return {mixture: E for layer in self.layers for mixture, E in layer.mixtures().items()}

    @contextmanager
    def listening(self, *, gradients_only: bool = False) -> Iterator[RoutingListener]:
        """Record every forward that this thread makes inside.

        Args:
            gradients_only: Whether to leave out forwards without gradients.
        """
        listener, before = RoutingListener(gradients_only=gradients_only), _LISTENERS.get()
        _LISTENERS.set((*before, (self, listener)))
        try:
            yield listener
        finally:
            _LISTENERS.set(before)

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the base model and its parts: open a run, or enter a part within the run that is open."""
        outer = _PLACE.get()
        if outer is not None and outer.base_only:
            return
        if outer is not None and outer.run.owner is self and self._contains(outer.module, module):
            batch = Batch.of_call(module, args, kwargs, outer.batch, outer.batch.facts)
            _PLACE.set(Place(outer.run, batch, module, outer, outer.repeated))
            return
        if getattr(module, "_is_replica", False):
            raise MoeLoraError(
                "the model runs in torch.nn.DataParallel, which copies it at each forward, so that routing biases and "
                "records of the copies would be lost; allowed: DistributedDataParallel (torchrun), or one device."
            )
        if outer is not None and outer.run.owner is self:
            outer = None  # left by a call that was interrupted: torch calls no hooks after a KeyboardInterrupt
        repeated = in_backward()  # somebody checkpoints the whole model: it was recorded the first time
        listeners = tuple(listener for hooks, listener in _LISTENERS.get() if hooks is self and not repeated)
        run = ModelRun(self, listeners, torch.is_grad_enabled())
        if run.grad_enabled and module.training and not repeated:
            self._carry_through_checkpointing()
            if not listeners and not self.warned and any(layer.expects_balance_loss() for layer in self.layers):
                self.warned = True
                _warn_that_nobody_adds_the_loss()
        batch = Batch.of_call(module, args, kwargs, None, _FACTS.get())
        wanted = self._wanted(batch.facts)
        if wanted:
            derived = derive(module, args, kwargs, batch, wanted, partial(self._base_pass, run))
            hidden_BSD = derived.pop(BASE_HIDDEN, None)
            prepared = {} if hidden_BSD is None else self._prepare(hidden_BSD)
            batch = replace(batch, facts={**batch.facts, **derived}, prepared=prepared)
        _PLACE.set(Place(run, batch, module, outer, repeated))

    def facts_of_prompts(self, module: nn.Module, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What routing by sequence has to know of prompts that a generation starts from; empty if it does not.

        Args:
            module: The model that generates.
            kwargs: Its inputs by name.
        """
        batch = Batch.of_call(module, (), kwargs, None, _FACTS.get())
        wanted = self._wanted(batch.facts) - {BASE_HIDDEN}  # that is of each forward, not of the prompt
        run = ModelRun(self, (), False)
        return derive(module, (), kwargs, batch, wanted, partial(self._base_pass, run)) if wanted else {}

    def reads_base_hidden(self) -> bool:
        """Whether an active mixture routes by a first pass over all tokens, so that no KV cache may be used."""
        return self.derives and any(BASE_HIDDEN in layer.needs() for layer in self.layers)

    def _wanted(self, facts: Mapping[str, Any]) -> frozenset[str]:
        """The facts to derive: what active mixtures need; no mean if the user gave an embedding of his own."""
        if not self.derives:
            return frozenset()
        needed = frozenset().union(*(layer.needs() for layer in self.layers))
        own_embedding = "instance_embedding" in facts
        return frozenset(
            fact for fact in needed - set(facts) if is_derived(fact) and not (own_embedding and is_prompt_mean(fact))
        )

    def _prepare(self, hidden_BSD: Tensor) -> dict[str, Tensor]:
        """What routers make of the base's hidden states, with gradients: once, outside all checkpointed layers."""
        routers = {adapter: router for layer in self.layers for adapter, router in layer.routers_of_base_hidden()}
        return {adapter: router.prepare(hidden_BSD) for adapter, router in routers.items()}

    def _base_pass(self, run: ModelRun, module: nn.Module, inputs: Mapping[str, Any]) -> Any:
        """Run a part of the base model without any adapter, without gradients."""
        before = _PLACE.get()
        _PLACE.set(Place(run, Batch(), _NOWHERE, before, base_only=True))
        try:
            return module(**inputs)
        finally:
            _PLACE.set(before)

    def after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the same modules, called after a failure too: leave the part, or close the run."""
        place = _PLACE.get()
        if place is None or place.module is not module:
            return  # the call failed before it was entered
        _PLACE.set(place.outer)
        closes = place.outer is None or place.outer.run is not place.run
        if closes and output is not None and place.run.grad_enabled and module.training and not place.repeated:
            self.when_done(self, place.run)

    def _contains(self, outer: nn.Module, module: nn.Module) -> bool:
        """Whether one of the model's parts is within another one."""
        name = self.names[outer]
        return module is not outer and self.names[module].startswith(f"{name}." if name else "")

    def _carry_through_checkpointing(self) -> None:
        if torch.compiler.is_compiling():
            return
        for module in self.checkpointed:
            function = module.__dict__.get(_CHECKPOINTING)
            if function is not None and not isinstance(function, _Checkpointing):
                module.__dict__[_CHECKPOINTING] = _Checkpointing(function)


class _Checkpointing:
    """transformers' checkpointing function, which also hands on the place that layers are to be run again at."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, layer: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        place = _PLACE.get()
        return self.function(layer if place is None else _Carried(layer, place), *args, **kwargs)


class _Carried:
    """A layer that finds itself at the same place when it is run again."""

    def __init__(self, layer: Callable[..., Any], place: Place) -> None:
        self.layer = layer
        self.place = place
        self.has_run = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = _PLACE.get()
        _PLACE.set(replace(self.place, repeated=self.has_run))
        self.has_run = True
        try:
            return self.layer(*args, **kwargs)
        finally:
            _PLACE.set(before)


# torch.compile runs it for real while tracing, instead of breaking the graph at a logger
@torch.compiler.assume_constant_result
def _warn_that_nobody_adds_the_loss() -> bool:
    logger.warning(
        "The adapter is configured with a balance loss, but nothing adds it: training continues without it. Use "
        "MoeLoraTrainer, MoeLoraSFTTrainer or MoeLoraTrainerMixin, or add moelora.balance_losses yourself."
    )
    return True


def own_hooks(model: nn.Module) -> RunHooks | None:
    """The hooks installed on this very module, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def _models_in(model: nn.Module) -> dict[nn.Module, str]:
    """The base model, and its parts that are models of their own and may be called by themselves, with their names."""
    return {p: name for name, p in model.named_modules() if p is model or isinstance(p, PreTrainedModel)}


def attach_hooks(model: nn.Module, hooks: RunHooks) -> None:
    """Install hooks on a base model; nothing if they are there."""
    if own_hooks(model) is hooks:
        return
    model.__dict__[_ATTRIBUTE] = hooks
    hooks.checkpointed = [part for part in model.modules() if hasattr(part, "gradient_checkpointing")]
    hooks.names = _models_in(model)
    for part in hooks.names:
        part.register_forward_pre_hook(hooks.before_model, with_kwargs=True)
        part.register_forward_hook(hooks.after_model, always_call=True)


def detach_hooks(model: nn.Module) -> None:
    """Remove the hooks from a base model."""
    hooks = model.__dict__.pop(_ATTRIBUTE, None)
    for module in _models_in(model):
        # found by owner, not kept as handles, which a deep copy of the model would leave pointing at the original
        for registered, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in registered.items() if getattr(hook, "__self__", None) is hooks]:
                del registered[key]
                flags.pop(key, None)
    for module in hooks.checkpointed if hooks is not None else ():
        function = module.__dict__.get(_CHECKPOINTING)
        if isinstance(function, _Checkpointing):
            module.__dict__[_CHECKPOINTING] = function.function


def find_hooks(model: nn.Module) -> RunHooks | None:
    """The hooks of a model that contains a moelora adapter at any depth (PeftModel, DDP, compiled), or None."""
    return next((hooks for hooks in map(own_hooks, model.modules()) if hooks is not None), None)


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingListener]:
    """Record the routing of every forward of `model` that this thread makes inside, with or without gradients.

    Args:
        model: A model with a moelora adapter.

    Yields:
        A listener; read its `records`, and `clear()` it between forwards to save memory.

    Raises:
        MoeLoraError: If the model has no moelora adapter.
    """
    hooks = find_hooks(model)
    if hooks is None:
        raise MoeLoraError(
            f"{type(model).__name__} has no moelora adapter, so there is no routing to record. "
            "Add one with peft.get_peft_model(model, MoeLoraConfig.from_preset(...))."
        )
    with hooks.listening() as listener:
        yield listener
