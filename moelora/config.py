"""The configuration of a mixture of LoRA experts: one nested part for each axis of the design, and PEFT's own words."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from peft import PeftConfig

from moelora.errors import ConfigError, FormatVersionError
from moelora.validation import (
    check,
    check_bool,
    check_choice,
    check_keys,
    check_pattern,
    is_count,
    is_index,
    is_real,
    is_share,
)
from moelora.version import FORMAT_VERSION, __version__

if TYPE_CHECKING:
    from torch import nn

Initialisation = Literal["kaiming", "normal"]
Score = Literal["softmax", "sigmoid"]
BalanceForm = Literal["switch", "mixtral"]
BalanceScope = Literal["global", "micro_batch"]
Implementation = Literal["fast", "compiled", "reference"]


@dataclass(kw_only=True)
class ExpertsConfig:
    """What one expert computes: `scaling * B A x`, with `scaling = lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).

    Args:
        num_experts: Number of experts E of a mixture.
        r: Rank of **one** expert.
        lora_alpha: LoRA's alpha, for one expert.
        lora_dropout: Probability of dropping an element of the input of A, in training. The experts of a mixture share
            one draw (the papers' codes draw one each; the expectation is the same).
        use_rslora: Scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732).
        init: How A starts: "kaiming" is `kaiming_uniform_(a=sqrt(5))` as in LoRA, "normal" is N(0, `init_std`). B is 0.
        init_std: Standard deviation of the "normal" initialisation.
    """

    num_experts: int = 8
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: Initialisation = "kaiming"
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check(is_count(self.num_experts), "num_experts", self.num_experts, "an integer of at least 1")
        check(is_count(self.r), "r", self.r, "an integer of at least 1")
        check(is_real(self.lora_alpha), "lora_alpha", self.lora_alpha, "a finite number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check_bool("use_rslora", self.use_rslora)
        check_choice("experts.init", self.init, Initialisation)
        check(is_real(self.init_std) and self.init_std > 0, "init_std", self.init_std, "a positive number")

    @property
    def scaling(self) -> float:
        """The factor of `B A x`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(kw_only=True)
class PlacementConfig:
    """What a mixture wraps.

    Args:
        feed_forward: Whether the targeted linears of a feed-forward block form one mixture of whole feed-forward
            experts (MixLoRA). If not, each targeted linear has a mixture and a router of its own.
        unrouted_modules: Targeted linears that get one ordinary LoRA instead of a mixture: "rest" (every target
            outside the feed-forward blocks), a regex, a list of name endings as in `target_modules`, or None.
    """

    feed_forward: bool = False
    unrouted_modules: str | list[str] | None = None

    def __post_init__(self) -> None:
        check_bool("placement.feed_forward", self.feed_forward)
        if self.unrouted_modules is not None:
            check_pattern(
                "placement.unrouted_modules", self.unrouted_modules, "'rest', a regex, a list of name endings, or None"
            )
        if isinstance(self.unrouted_modules, (set, tuple)):
            self.unrouted_modules = sorted(self.unrouted_modules)
        check(
            self.unrouted_modules != "rest" or self.feed_forward,
            "placement.unrouted_modules",
            self.unrouted_modules,
            "'rest' only together with feed_forward=True",
            "With feed_forward=False nothing would be routed; set unrouted_modules=None or name the linears.",
        )


@dataclass(kw_only=True)
class RoutingConfig:
    """Who is chosen, and with what weight.

    Args:
        score: "softmax" over the experts, or an independent "sigmoid" for each.
        top_k: Number of experts a token is sent to; None is dense routing (all experts, weighted by their scores).
        renormalize: Whether the weights of the chosen experts are divided by their sum.
        trainable: Whether the router is trained. If not it is a saved buffer: a fixed random router.
        init_std: The router starts at N(0, `init_std`); None is `nn.Linear`'s default (kaiming uniform).
        expert_dropout: Probability of dropping an expert's score, for one token, in training (SiRA).
        capacity_factor: An expert takes at most `ceil(capacity_factor * top_k * S / E)` tokens of a sequence of S valid
            tokens, first choices first, then in token order; what is past it is dropped. None is no limit.
        capacity_in_eval: Whether the capacity holds outside training too. It makes an output depend on later tokens
            of the sequence, so generation with and without a KV cache can then differ.
        bias_update_rate: Step u of the bias-based balancing: after each training forward an expert's bias moves by u
            up if it got fewer tokens than the mean, else down (SMoRA). 0 is no bias.
    """

    score: Score = "softmax"
    top_k: int | None = 2
    renormalize: bool = True
    trainable: bool = True
    init_std: float | None = 0.02
    expert_dropout: float = 0.0
    capacity_factor: float | None = None
    capacity_in_eval: bool = False
    bias_update_rate: float = 0.0

    def __post_init__(self) -> None:
        check_choice("routing.score", self.score, Score)
        check(self.top_k is None or is_count(self.top_k), "top_k", self.top_k, "an integer of at least 1, or None")
        check_bool("routing.renormalize", self.renormalize)
        check_bool("routing.trainable", self.trainable)
        check_bool("routing.capacity_in_eval", self.capacity_in_eval)
        std = self.init_std
        check(std is None or (is_real(std) and std >= 0), "routing.init_std", std, "a number of at least 0, or None")
        check(is_share(self.expert_dropout), "expert_dropout", self.expert_dropout, "0 <= expert_dropout < 1")
        capacity = self.capacity_factor
        check(
            capacity is None or (is_real(capacity) and capacity > 0),
            "capacity_factor",
            capacity,
            "a positive number, or None",
        )
        check(
            capacity is None or self.top_k is not None,
            "capacity_factor",
            capacity,
            "None with dense routing (top_k=None)",
            "A capacity limits how many tokens choose an expert; with dense routing all do. Set top_k.",
        )
        check(
            self.capacity_factor is not None or not self.capacity_in_eval,
            "capacity_in_eval",
            self.capacity_in_eval,
            "False without a capacity_factor",
        )
        rate = self.bias_update_rate
        check(is_real(rate) and rate >= 0, "bias_update_rate", rate, "a number of at least 0")
        check(
            rate == 0 or (self.top_k is not None and self.score == "sigmoid"),
            "bias_update_rate",
            rate,
            "0 unless routing is sigmoid top-k",
        )


@dataclass(kw_only=True)
class BalanceConfig:
    """What keeps the experts in use. The trainers of `moelora.training` add it to the loss; see `moelora.losses`.

    Args:
        loss: "switch": `E * sum_e f_e P_e` a layer, 1.0 at perfect balance, then the mean over the layers. "mixtral":
            the pooled form of Mixtral's and MixLoRA's code, top_k at perfect balance.
        coef: Coefficient of the balance loss, in the convention of the chosen form. 0 switches it off.
        z_loss_coef: Coefficient of the router z-loss `mean_t logsumexp(z_t)^2` (arXiv 2202.08906), mean over layers.
        scope: Which tokens share one balance: "global" is the whole optimizer step, over all accumulated micro-batches
            and all processes, so that the loss does not depend on how the batch was cut (with gradient accumulation
            this costs one more forward without gradients a micro-batch); "micro_batch" takes each alone.
    """

    loss: BalanceForm = "switch"
    coef: float = 0.0
    z_loss_coef: float = 0.0
    scope: BalanceScope = "global"

    def __post_init__(self) -> None:
        check_choice("balance.loss", self.loss, BalanceForm)
        check_choice("balance.scope", self.scope, BalanceScope)
        for name in ("coef", "z_loss_coef"):
            value = getattr(self, name)
            check(is_real(value) and value >= 0, f"balance.{name}", value, "a number of at least 0")

    @property
    def enabled(self) -> bool:
        """Whether any loss is to be added."""
        return self.coef > 0 or self.z_loss_coef > 0


@dataclass(kw_only=True)
class ComputeConfig:
    """How the mixture is computed; the result is the same up to rounding.

    Args:
        implementation: "fast" takes the fast operations of `moelora.ops`; "reference" the per-token loops they are
            tested against (slow, to find faults); "compiled" has `torch.compile` make the element-wise part of
            feed-forward mixtures on the CPU. Where that fails, a warning says why and "fast" goes on.
    """

    implementation: Implementation = "fast"

    def __post_init__(self) -> None:
        check_choice("compute.implementation", self.implementation, Implementation)


_PART = TypeVar("_PART")
_PARTS: dict[str, type] = {
    "experts": ExpertsConfig,
    "placement": PlacementConfig,
    "routing": RoutingConfig,
    "balance": BalanceConfig,
    "compute": ComputeConfig,
}


def _build_part(name: str, part: type[_PART], value: Any) -> _PART:
    if isinstance(value, part):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {value!r}; allowed: a {part.__name__} or a dict of its fields.")
    check_keys(f"{name} ({part.__name__})", value, get_type_hints(part))
    return part(**value)


def _strict(cls: type) -> type:
    """Refuse unknown keys before PEFT can drop them with a warning, and files of a newer format before all else."""
    original = cls.__init__  # type: ignore[misc]
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        found = kwargs.get("format_version", FORMAT_VERSION)
        if not is_count(found) or found > FORMAT_VERSION:
            raise FormatVersionError(
                f"the adapter has format_version {found!r}, written by moelora "
                f"{kwargs.get('moelora_version', 'of an unknown version')}; moelora {__version__} reads 1 to "
                f"{FORMAT_VERSION}. Upgrade with `pip install -U moelora`."
            )
        check_keys(cls.__name__, kwargs, names)
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


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
        experts, placement, routing, balance, compute: The five axes; each takes a dict of its fields too.
        preset: Name of the preset this came from, for information.
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
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    preset: str | None = field(default=None)
    moelora_version: str = field(default=__version__)
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        from moelora.peft_plugin import PEFT_TYPE

        given: Any = getattr(self, "peft_type", None)
        check(given in (None, PEFT_TYPE), "peft_type", given, f"{PEFT_TYPE.value!r}, or None")
        self.peft_type = PEFT_TYPE
        for name, part in _PARTS.items():
            setattr(self, name, _build_part(name, part, getattr(self, name)))
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        self._check_targets()
        self._check_axes()

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
        check(
            self.modules_to_save is None or isinstance(self.modules_to_save, (list, set, tuple)),
            "modules_to_save",
            self.modules_to_save,
            "a list of names, or None",
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

    def _check_axes(self) -> None:
        top_k, num_experts = self.routing.top_k, self.experts.num_experts
        check(
            top_k is None or top_k <= num_experts,
            "top_k",
            top_k,
            f"1 to num_experts ({num_experts}), or None for dense routing",
            "Lower top_k or raise num_experts.",
        )
        check(
            self.routing.trainable or not self.balance.enabled,
            "balance",
            self.balance,
            "coef=0 and z_loss_coef=0 with routing.trainable=False",
            "The router is not trained, so a balance loss changes nothing.",
        )

    # What PEFT and transformers read of every config that can be hot-swapped or resized.
    @property
    def r(self) -> int:
        """Rank of one expert."""
        return self.experts.r

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha, for one expert."""
        return self.experts.lora_alpha

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is `lora_alpha / sqrt(r)`."""
        return self.experts.use_rslora

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
        """The factor of one expert's `B A x`."""
        return self.experts.scaling

    @classmethod
    def from_preset(cls, name: str, **words: Any) -> MoeLoraConfig:
        """Make the configuration of a published method.

        Args:
            name: One of `moelora.presets.available()`.
            **words: The preset's own words (`help(moelora.presets.mixlora)`) and PEFT's (`target_modules`, ...).

        Raises:
            ConfigError: For an unknown preset or word, or a value out of range.
        """
        from moelora.presets import build

        return build(name, words)

    def num_trainable_parameters(self, model: nn.Module) -> int:
        """Count the parameters that `peft.get_peft_model(model, self)` would train, without changing `model`.

        Args:
            model: The base model.

        Raises:
            TargetError: If the configuration does not fit the model.
        """
        from moelora.parameter_count import count_trainable_parameters

        return count_trainable_parameters(model, self)

    def describe(self) -> dict[str, dict[str, Any]]:
        """The five axes as plain dicts, for reports."""
        return {name: dataclasses.asdict(getattr(self, name)) for name in _PARTS}
