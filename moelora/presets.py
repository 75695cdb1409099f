"""Published methods as named points on the axes of `MoeLoraConfig`.

A preset is a function of keyword words that returns a configuration; it is never a code path of its own. Every preset
takes PEFT's words as well (`target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
`modules_to_save`, `bias`, `task_type`, ...) and `compute`, how it is computed. Balance coefficients are in the
library's convention: 1.0 at perfect balance, the mean over the layers.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from moelora.config import (
    BalanceConfig,
    ExpertsConfig,
    MoeLoraConfig,
    PlacementConfig,
    RoutingConfig,
)
from moelora.errors import ConfigError
from moelora.validation import check_keys


def mixlora(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    balance_scope: str = "global",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixLoRA (arXiv 2404.15159): whole feed-forward experts, routed per block, and plain LoRA on the other linears.

    `p = softmax(W_r h)`, the top-k weights renormalised to sum 1 (Eq. 7 and the authors' code), and

        E_e(h) = W2 a_e + s B2_e A2_e a_e,  a_e = act(W1 h + s B1_e A1_e h) * (W3 h + s B3_e A3_e h)
        y      = sum_k w_k E_{e_k}(h)

    with frozen W1, W2, W3 shared by all experts. Plain two-linear blocks and fused gate_up blocks have the same form
    (the fused linear has one LoRA, as in the authors' code). Defaults are those of the paper's Table 3.

    Deviations: `balance_coef` is the paper's 1e-2 (Eq. 8-10); there `f` counts the argmax, here all k choices divided
    by k, which is 1.0 at balance as well. The authors' code uses 1e-3 on the pooled form that is k at balance:
    `balance_loss="mixtral", balance_coef=1e-3`. Dropout draws are shared by the experts. The code's router jitter (0 by
    default) is not offered. With the default `target_modules` every linear outside the feed-forward blocks but the head
    gets a plain LoRA; in a decoder those are the attention linears.
    """
    return MoeLoraConfig(
        preset="mixlora",
        experts=ExpertsConfig(
            num_experts=num_experts, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora
        ),
        placement=PlacementConfig(feed_forward=True, unrouted_modules="rest"),
        routing=RoutingConfig(top_k=top_k, init_std=router_init_std),
        balance=BalanceConfig(
            loss=balance_loss,  # type: ignore[arg-type]
            coef=balance_coef,
            z_loss_coef=z_loss_coef,
            scope=balance_scope,  # type: ignore[arg-type]
        ),
        **peft_words,
    )


def random_router(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """A control: MixLoRA's sites and experts with a frozen random top-k router and no balance loss.

    What a method gains over this, it gains by learning where to route.
    """
    config = mixlora(
        r=r,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_rslora=use_rslora,
        num_experts=num_experts,
        top_k=top_k,
        balance_coef=0.0,
        router_init_std=router_init_std,
        **peft_words,
    )
    config.preset = "random_router"
    config.routing.trainable = False
    return config


def sira(
    *,
    r: int = 4,
    lora_alpha: float = 4,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    num_experts: int = 16,
    top_k: int = 4,
    expert_dropout: float = 0.5,
    capacity_factor: float | None = 1.25,
    capacity_in_eval: bool = False,
    renormalize: bool = False,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    balance_scope: str = "global",
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """SiRA (arXiv 2311.09179): sparse LoRA experts on every linear, with expert dropout and a capacity limit.

        G(x) = TopK(Dropout_p(softmax(W_r x)), k),   y = W0 x + s sum_e G(x)_e B_e A_e x

    No code was published and only the abstract could be checked: top-k routing, a capacity limit, "expert dropout on
    top of the gating network", and a load-balancing loss. **Unverified choices**: dropout acts on the softmax's output
    with the usual inverted scaling; the kept weights are not renormalised; 16 experts of rank 4, k = 4 and p = 0.5 are
    recalled, not read; `capacity_factor` 1.25 and `balance_coef` 1e-2 are ours, as is scaling 1 (`lora_alpha = r`).

    Deviations: GShard's auxiliary loss `(1/E) sum_e (c_e/S) m_e` differs from ours by a constant (k / E^2 at balance
    against 1). The capacity holds per sequence and in training only (`capacity_in_eval`): a global capacity would let
    the sequences of a batch influence each other.
    """
    return MoeLoraConfig(
        preset="sira",
        experts=ExpertsConfig(
            num_experts=num_experts, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora
        ),
        routing=RoutingConfig(
            top_k=top_k,
            renormalize=renormalize,
            init_std=router_init_std,
            expert_dropout=expert_dropout,
            capacity_factor=capacity_factor,
            capacity_in_eval=capacity_in_eval,
        ),
        balance=BalanceConfig(
            loss=balance_loss,  # type: ignore[arg-type]
            coef=balance_coef,
            z_loss_coef=z_loss_coef,
            scope=balance_scope,  # type: ignore[arg-type]
        ),
        **peft_words,
    )


def smora(
    *,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    top_k: int = 8,
    bias_update_rate: float = 1e-5,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    balance_scope: str = "global",
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """SMoRA (arXiv 2501.15103): `r` experts of rank one on every linear, `top_k` of them active.

        v = sigmoid(W_r x) + b,   y = W0 x + alpha sum_{i in top-k} (v_i / sum v) B[:, i] (A[i, :] x)

    as in the authors' current code: the biased score both selects and weights, and after every training forward
    `b += u sign(mean(n) - n)` with n the number of tokens of each expert. `r` is the **total** rank.

    Deviations: the official code's router sees the input after LoRA dropout, ours before it (the same at the default
    0); padding is not counted in n and the counts of all data-parallel processes are summed (the official processes
    drift apart); the bias does not move again when checkpointing recomputes. Whether the paper's own gate is a softmax
    or a sigmoid could not be checked; this is the code's. The sum of v is kept away from 0 by 1e-9.
    """
    return MoeLoraConfig(
        preset="smora",
        experts=ExpertsConfig(num_experts=r, r=1, lora_alpha=lora_alpha, lora_dropout=lora_dropout),
        routing=RoutingConfig(
            score="sigmoid", top_k=top_k, init_std=router_init_std, bias_update_rate=bias_update_rate
        ),
        balance=BalanceConfig(coef=balance_coef, z_loss_coef=z_loss_coef, scope=balance_scope),  # type: ignore[arg-type]
        **peft_words,
    )


def molora(
    *,
    r: int = 4,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    num_experts: int = 10,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    balance_scope: str = "global",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoLoRA (arXiv 2309.05444): dense soft routing over LoRA experts on every linear.

        p = softmax(W_r x),   y = W0 x + (alpha / r) sum_e p_e B_e A_e x

    A and W_r start at N(0, 0.02), B at 0, as in the authors' T5X code; no auxiliary loss. The paper targets q, k, v, o,
    wi and wo of T5, which is every linear but the head.
    """
    return MoeLoraConfig(
        preset="molora",
        experts=ExpertsConfig(
            num_experts=num_experts,
            r=r,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init="normal",
        ),
        routing=RoutingConfig(top_k=None, renormalize=False, init_std=router_init_std),
        balance=BalanceConfig(coef=balance_coef, z_loss_coef=z_loss_coef, scope=balance_scope),  # type: ignore[arg-type]
        **peft_words,
    )


def lora(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    **peft_words: Any,
) -> MoeLoraConfig:
    """A control: ordinary LoRA (arXiv 2106.09685) through moelora's own layers, one expert and no router.

    Equal to `peft.LoraConfig` of the same rank on the same targets.
    """
    return MoeLoraConfig(
        preset="lora",
        experts=ExpertsConfig(
            num_experts=1, r=r, lora_alpha=lora_alpha, lora_dropout=lora_dropout, use_rslora=use_rslora
        ),
        placement=PlacementConfig(unrouted_modules=".*"),
        routing=RoutingConfig(top_k=1),
        **peft_words,
    )


_PRESETS: dict[str, Callable[..., MoeLoraConfig]] = {
    preset.__name__: preset for preset in (mixlora, sira, smora, molora, random_router, lora)
}

_PEFT_WORDS = frozenset(inspect.signature(MoeLoraConfig.__init__).parameters) - {
    "self",
    "args",
    "kwargs",
    "auto_mapping",
    "peft_type",
    "peft_version",
    "experts",
    "placement",
    "routing",
    "balance",
    "preset",
    "moelora_version",
    "format_version",
}


def available() -> list[str]:
    """The names `MoeLoraConfig.from_preset` takes."""
    return list(_PRESETS)


def words(name: str) -> list[str]:
    """The keyword words that a preset takes, its own first.

    Raises:
        ConfigError: If there is no such preset.
    """
    own = [key for key, parameter in _signature(name).items() if parameter.kind is parameter.KEYWORD_ONLY]
    return own + sorted(_PEFT_WORDS)


def _signature(name: str) -> dict[str, inspect.Parameter]:
    if name not in _PRESETS:
        guess = "".join(f" Did you mean {match!r}?" for match in difflib.get_close_matches(str(name), _PRESETS, n=1))
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(_PRESETS)}.{guess}")
    return dict(inspect.signature(_PRESETS[name]).parameters)


def build(name: str, given: dict[str, Any]) -> MoeLoraConfig:
    """Call the preset `name` with `given`; see `MoeLoraConfig.from_preset`."""
    check_keys(f"preset {name!r}", given, words(name))
    return _PRESETS[name](**given)
