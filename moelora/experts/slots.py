"""Adapters beside a block that work on soft slots of a sequence (Soft-MoA).

Shape suffixes: B rows, S tokens of a row, D features, E slots of all adapters, N adapters, P slots of one, M inner
features of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, is_count, is_share


@register
@dataclass(frozen=True, kw_only=True)
class SlotExperts(Experts):
    """`y_s + sum_e C_se adapter(sum_s D_se x_s)`: soft mixtures of a sequence's tokens go through adapters, and back.

    Soft-MoA (arXiv 2402.00828). With z the router's logits of tokens and slots D is the softmax over the tokens of a
    sequence, C over the slots; `adapter(v) = Up gelu(Down v)`, of which Up starts at 0. Each token sees the whole
    sequence, so that models whose tokens must not see later ones are refused.

    Args:
        num_experts: E, the number of slots; each adapter has `slots` of them.
        slots: P.
        bottleneck: M.
        lora_dropout: Probability of dropping an element of a slot before Down, in training.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "slots"

    num_experts: int = 4
    slots: int = 1
    bottleneck: int = 16
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "slots", "bottleneck"):
            check(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 1")
        whole = self.num_experts % self.slots == 0
        check(whole, "experts.num_experts", self.num_experts, f"a multiple of the slots of one adapter ({self.slots})")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")

    def check(self, config: Any) -> None:
        """Refuse a causal language model, and anything but a dense softmax beside a block.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.task_type != "CAUSAL_LM",
            "task_type",
            config.task_type,
            "that of an encoder, as 'SEQ_CLS' or 'FEATURE_EXTRACTION', with 'slots' experts",
            "A slot mixes all tokens of a sequence, so that a token would see those that come after it.",
        )
        check(
            config.placement.kind == "block",
            "placement",
            config.placement.describe(),
            "'block' with 'slots' experts",
            "They stand beside a whole block.",
        )
        check(
            config.scores.is_distribution and config.selection.is_dense,
            "selection",
            config.selection.describe(),
            "'dense', and scores that are a softmax, with 'slots' experts",
            "Every token reads every slot.",
        )

    def check_site(self, site: Site) -> None:
        """See `Choice.check_site`."""
        if site.causal is not False:
            what = (
                "attends to earlier tokens only" if site.causal else "does not say whether it attends to later tokens"
            )
            raise ConfigError(
                f"{site.name!r} is in a layer that {what}, and 'slots' experts (Soft-MoA) mix all tokens of a "
                "sequence, so that a token would see those that come after it; allowed: encoders, as BERT. Leave a "
                "decoder out with exclude_modules, or take another preset."
            )

    def params(self, site: Site) -> list[Param]:
        """`down.weight` [N, M, D] and `up.weight` [N, D, M], and what is added, `S`."""
        N, M, D = site.num_experts // self.slots, self.bottleneck, site.router_features
        return [
            Param("down.weight", (N, M, D), Init("kaiming")),
            Param("up.weight", (N, D, M), Init("zeros")),
            Param("S.down", (N, M), Init("zeros")),
            Param("S.up", (N, D), Init("zeros")),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`.

        Raises:
            ConfigError: If a row holds several sequences.
        """
        x, tokens = given.x, given.tokens
        sequence_BS = tokens.sequence_BS
        if sequence_BS is not None and bool((sequence_BS != sequence_BS[:, :1]).any()):
            raise ConfigError(
                "the adapter mixes all tokens of a row, and a row holds several sequences; allowed: rows of one "
                "sequence each. Turn packing off."
            )
        routing = given.route(x)
        B, S = tokens.valid_BS.shape
        logits_BSE = routing.logits_TE.view(B, S, -1).masked_fill(~tokens.valid_BS.unsqueeze(-1), float("-inf"))
        down, up = given.tensor("down.weight"), given.tensor("up.weight")
        dispatch_BSE = logits_BSE.softmax(1).nan_to_num(0.0).to(down.dtype)  # a row of nothing but padding
        slots_BED = torch.einsum("bse,bsd->bed", dispatch_BSE, x.view(B, S, -1).to(down.dtype))
        slots_BNPD = given.dropout(slots_BED).unflatten(1, (len(down), self.slots))
        inner = F.gelu(torch.einsum("bnpd,nmd->bnpm", slots_BNPD, down) + given.tensor("S.down").unsqueeze(1))
        made = torch.einsum("bnpm,ndm->bnpd", inner, up) + given.tensor("S.up").unsqueeze(1)
        combine_BSE = routing.gates_TE().view(B, S, -1).to(made.dtype)
        y = given.base(x)
        return (y + (combine_BSE @ made.flatten(1, 2)).view(y.shape)).to(y.dtype)
