"""The configuration of a mixture of LoRA experts: PEFT's own words, and a choice on each axis of the design."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig
from torch import nn

from moelora import preset_registry
from moelora.choices import Param, Site, kinds, read, write
from moelora.errors import ConfigError, FormatVersionError
from moelora.formats import upgrade_config
from moelora.peft_plugin import tuner_class
from moelora.peft_type import PEFT_TYPE
from moelora.validation import (
    check,
    check_bool,
    check_choice,
    check_keys,
    check_pattern,
    check_word,
    is_count,
    is_index,
)
from moelora.version import FORMAT_VERSION, __version__

BalanceScope = Literal["global", "micro_batch"]

_DEFAULTS = {"experts": "lora", "placement": "linear", "scores": "linear", "selection": "top_k", "compute": "fast"}
"""The axes that have one choice, and its kind where none is given."""


def _strict(cls: type) -> type:
    """Refuse unknown keys before PEFT can drop them with a warning, and files of a newer format before all else."""
    original = cls.__init__  # type: ignore[misc]
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if "format_version" in kwargs:
            kwargs = _of_file(kwargs)
        check_keys(cls.__name__, kwargs, names)
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


def _of_file(words: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saved configuration in today's words."""
    found = words["format_version"]
    if not is_count(found) or found > FORMAT_VERSION:
        raise FormatVersionError(
            f"the adapter has format_version {found!r}, written by moelora "
            f"{words.get('moelora_version', 'of an unknown version')}; moelora {__version__} reads 1 to "
            f"{FORMAT_VERSION}. Install a moelora that is at least as new."
        )
    return {**upgrade_config(words, found), "format_version": FORMAT_VERSION}


@_strict
@dataclass
class MoeLoraConfig(PeftConfig):
    """Configuration of a routed mixture of LoRA experts; usually made by `from_preset`.

    Args:
        target_modules: The linears to adapt, in any form `peft.LoraConfig` takes: name endings, a regex, or
            "all-linear" (every linear but the output head).
        exclude_modules: Linears to leave out (name endings or a regex).
        layers_to_transform: Indices of the layers to adapt; None is all of them. `target_modules` must list names then.
        layers_pattern: Name of the `nn.ModuleList` those indices belong to, as "language_model.layers"; needed where
            the targets are in several stacks of layers, and a list of names takes several stacks.
        modules_to_save: Modules that are trained and saved whole, next to the adapter.
        bias: "none", "all" or "moelora_only": which biases of the base are trained and saved.
        trainable_token_indices: Tokens whose embeddings are trained as well, as in `peft.LoraConfig`.
        experts, placement, scores, selection, compute: A choice on each axis: its kind, or a dict of its kind and
            fields such as `{"kind": "top_k", "k": 2}`, or the choice itself.
        balance: Any number of choices of balance.
        balance_scope: Which tokens share one balance: "global" is the whole optimizer step, over all accumulated
            micro-batches and all processes, so that the loss does not depend on how the batch was cut (with gradient
            accumulation this costs one more forward without gradients per micro-batch); "micro_batch" takes each alone.
        preset: Name of the preset this came from, for information.
        base_fingerprint: What the base model was when the adapter was saved, written by saving; see
            `moelora.fingerprint`. Loading refuses another base. None compares nothing.
        moelora_version: Version of moelora that wrote it.
        format_version: Version of the file format.

    Raises:
        ConfigError: For an unknown key, a value out of range, or a contradiction.
        FormatVersionError: If it was written in a newer format than this version reads.
    """

    target_modules: list[str] | set[str] | str = field(default="all-linear")
    exclude_modules: list[str] | set[str] | str | None = field(default=None)
    layers_to_transform: list[int] | int | None = field(default=None)
    layers_pattern: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)
    bias: str = field(default="none")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None)
    experts: Any = field(default=_DEFAULTS["experts"])
    placement: Any = field(default=_DEFAULTS["placement"])
    scores: Any = field(default=_DEFAULTS["scores"])
    selection: Any = field(default=_DEFAULTS["selection"])
    balance: Any = field(default=())
    balance_scope: BalanceScope = field(default="global")
    compute: Any = field(default=_DEFAULTS["compute"])
    preset: str | None = field(default=None)
    base_fingerprint: dict[str, Any] | None = field(default=None)
    moelora_version: str = field(default=__version__)
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(" ".join(str(error).split())) from error
        given: Any = getattr(self, "peft_type", None)
        check(given in (None, PEFT_TYPE), "peft_type", given, f"{PEFT_TYPE.value!r}, or None")
        self.peft_type = PEFT_TYPE
        for axis in _DEFAULTS:
            setattr(self, axis, read(axis, getattr(self, axis)))
        balance = self.balance if isinstance(self.balance, (list, tuple)) else [self.balance]
        self.balance = [read("balance", choice) for choice in balance]
        check_choice("balance_scope", self.balance_scope, BalanceScope)
        check_bool("inference_mode", self.inference_mode)
        stored = self.base_fingerprint
        check(
            stored is None or isinstance(stored, dict), "base_fingerprint", stored, "what saving wrote there, or None"
        )
        self._check_targets()
        for choice in self.choices():
            choice.check(self)
        self._check_balance()

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Called by PEFT with the fields of a file: refuse one that does not say its format.

        Raises:
            FormatVersionError: If `format_version` is missing.
        """
        if "format_version" not in kwargs:
            raise FormatVersionError(
                "the adapter's configuration has no format_version; allowed: 1 to "
                f"{FORMAT_VERSION}. The file is not as it was saved."
            )
        checked: dict[str, Any] = super().check_kwargs(**kwargs)
        return checked

    def _check_targets(self) -> None:
        targets = "name endings, a regex, or 'all-linear'"
        check_pattern("target_modules", self.target_modules, targets)
        check(
            bool(self.target_modules),
            "target_modules",
            self.target_modules,
            targets,
            "An empty selection would adapt nothing.",
        )
        if self.exclude_modules is not None:
            check_pattern("exclude_modules", self.exclude_modules, "name endings, a regex, or None")
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        for name in ("modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            names = value if isinstance(value, (list, set, tuple)) else [value]
            one_name = isinstance(value, str) and name == "layers_pattern"
            check(
                value is None or one_name or (names is value and all(isinstance(item, str) for item in names)),
                name,
                value,
                "a list of names, or None",
            )
        tokens = self.trainable_token_indices
        lists = tokens.values() if isinstance(tokens, dict) else [tokens]
        check(
            tokens is None or all(isinstance(each, list) and all(map(is_index, each)) for each in lists),
            "trainable_token_indices",
            tokens,
            "a list of token indices, a dict of such lists by the name of an embedding, or None",
        )
        if isinstance(self.modules_to_save, (set, tuple)):  # PEFT appends to it
            self.modules_to_save = sorted(self.modules_to_save)
        check(self.bias in ("none", "all", "moelora_only"), "bias", self.bias, "'none', 'all', 'moelora_only'")
        layers = self.layers_to_transform
        check(
            layers is None
            or is_index(layers)
            or (isinstance(layers, (list, tuple)) and len(layers) > 0 and all(map(is_index, layers))),
            "layers_to_transform",
            layers,
            "an index, a list of indices, or None for all layers",
        )
        check(
            layers is None or not isinstance(self.target_modules, str),
            "layers_to_transform",
            layers,
            f"None when target_modules is a regex or 'all-linear' (it is {self.target_modules!r})",
            "List the module names in target_modules, or put the layer numbers into the regex.",
        )
        check(
            self.layers_pattern is None or self.layers_to_transform is not None,
            "layers_pattern",
            self.layers_pattern,
            "None without layers_to_transform",
        )

    def _check_balance(self) -> None:
        of_routing = [choice for choice in self.balance if choice.has_loss and choice.reads == "routing"]
        names = [choice.logged_as if choice.is_loss else choice.kind for choice in self.balance]
        check(
            len(set(names)) == len(names),
            "balance",
            self.balance,
            "one load-balancing loss, one z-loss, one update of biases, one of each other kind",
            "Two of a sort would be added up and logged as one.",
        )
        check(
            self.scores.is_trained or not of_routing,
            "balance",
            of_routing,
            "no loss of routing with a router that is not trained",
            "A balance loss would change nothing.",
        )

    def choices(self) -> list[Any]:
        """The choices of all axes."""
        return [*(getattr(self, axis) for axis in _DEFAULTS), *self.balance]

    @property
    def has_balance_loss(self) -> bool:
        """Whether a trainer has a loss to add."""
        return any(choice.has_loss for choice in self.balance)

    @property
    def needs(self) -> frozenset[str]:
        """Facts of a batch that routing cannot do without; training may need more, for the balance."""
        return frozenset().union(*(getattr(self, axis).needs for axis in _DEFAULTS))

    def expert_params(self, site: Site) -> list[Param]:
        """The tensors of the experts at a site."""
        return list(self.experts.params(site))

    def router_params(self, site: Site) -> list[Param]:
        """The tensors of the router at a site; none where there is no router, or another site holds it."""
        owns = site.routed and site.owns_router
        return [*self.scores.params(site), *self.selection.params(site)] if owns else []

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values, as adapter_config.json holds them."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        written = {axis: write(getattr(self, axis)) for axis in _DEFAULTS}
        return {**fields, **written, "balance": [write(choice) for choice in self.balance]}

    # What PEFT and transformers read of every config that can be hot-swapped or resized.
    @property
    def r(self) -> int:
        """Rank of one expert."""
        return int(self.experts.r)

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha, for one expert."""
        return float(self.experts.lora_alpha)

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is `lora_alpha / sqrt(r)`."""
        return bool(self.experts.use_rslora)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """Empty: every expert has the same rank."""
        return {}

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """Empty: every expert has the same alpha."""
        return {}

    @property
    def target_parameters(self) -> None:
        """None: only modules are targeted."""
        return None

    @property
    def scaling(self) -> float:
        """The factor of one expert's low-rank product."""
        return float(self.experts.scaling)

    @classmethod
    def from_preset(cls, name: str, **words: Any) -> MoeLoraConfig:
        """Make the configuration of a published method.

        Args:
            name: One of `moelora.presets.available()`.
            **words: The preset's own words (`help(moelora.presets.mixlora)`), PEFT's (`target_modules`, ...), and the
                axes, which change what the preset chose there: a kind, fields, or both, such as
                `selection={"renormalize": False}` or `scores="cosine"`. What is not said stays as the preset has it,
                where the kind has such a field; `balance` replaces the preset's choices.

        Raises:
            ConfigError: For an unknown preset or word, or a value out of range.
        """
        own = preset_registry.own_words(name)
        axes = [axis for axis in (*_DEFAULTS, "balance") if axis not in (*own, "compute")]
        check_keys(f"preset {name!r}", words, [*own, *cls.peft_words(), *axes])
        for word in words.keys() & own.keys():
            check_word(word, words[word], own[word])
        compute = words.get("compute")
        if isinstance(compute, dict) and set(compute) == {"implementation"}:
            words["compute"] = compute["implementation"]
        changes = {axis: words.pop(axis) for axis in axes if axis in words}
        config: MoeLoraConfig = preset_registry.find(name)(**words)
        if not changes:
            return config
        changed = {axis: _changed(axis, getattr(config, axis), change) for axis, change in changes.items()}
        fields = {name: getattr(config, name) for name in inspect.signature(cls.__init__).parameters if name != "self"}
        return cls(**{**fields, **changed})

    @classmethod
    def peft_words(cls) -> list[str]:
        """The words that every preset takes beside its own."""
        ours = {"self", "args", "kwargs", "auto_mapping", "peft_type", "peft_version", "balance"}
        ours |= {"preset", "base_fingerprint", "moelora_version", "format_version", *_DEFAULTS} - {"compute"}
        return sorted(set(inspect.signature(cls.__init__).parameters) - ours)

    def num_trainable_parameters(self, model: nn.Module) -> int:
        """Count the parameters that `peft.get_peft_model(model, self)` would train, without changing `model`.

        Args:
            model: The base model.

        Raises:
            TargetError: If the configuration does not fit the model.
        """
        return int(tuner_class().count_trainable_parameters(model, self))

    def describe(self) -> dict[str, str]:
        """A phrase for each axis, for reports."""
        phrases = {axis: getattr(self, axis).describe() for axis in _DEFAULTS}
        phrases["balance"] = ", ".join(choice.describe() for choice in self.balance) or "none"
        return phrases


def _changed(axis: str, chosen: Any, change: Any) -> Any:
    """A choice with another kind, other fields, or both; what is not said stays, where the kind has such a field."""
    words = {"kind": change} if isinstance(change, str) else change
    kind = words.get("kind", getattr(chosen, "kind", None)) if isinstance(words, Mapping) else None
    if axis == "balance" or not isinstance(kind, str) or kind not in kinds(axis):
        return change  # whole, or refused when it is read
    names = {f.name for f in dataclasses.fields(kinds(axis)[kind])}
    return {**{key: value for key, value in write(chosen).items() if key in names}, **words, "kind": kind}
