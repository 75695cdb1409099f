"""LoRA experts that a token is routed through several times, with a recurrent state between the rounds (GraphMoE).

Shape suffixes: T tokens, E experts, R rank of one expert, H features of the state, D input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, is_count, is_positive, is_share


@register
@dataclass(frozen=True, kw_only=True)
class RoundsExperts(Experts):
    """A token's experts tell a state what they make of it, and the state routes it again; after GraphMoE's abstract.

        h_1 = S x
        round t:  g_t = route(h_t),  n_te = A_e x + V h_t,  h_{t+1} = GRU(sum_e g_te n_te, h_t)
        y = W x + scaling * sum_e g_Te B_e n_Te

    (arXiv 2501.07890). The experts are the nodes of a graph, whose one other node is the state: what an expert adds in
    the last of T rounds depends on what those of the rounds before found. The state is of H features, and it and the
    GRU are in fp32 as all of routing. B and V start at 0, A and S kaiming, the GRU as `nn.GRUCell` but without biases
    at first. Each round counts in balance losses and in what is recorded.

    Args:
        num_experts: Number of experts E.
        r: Rank R of one expert.
        lora_alpha: LoRA's alpha, for one expert.
        lora_dropout: Probability of dropping an element of the input of A, in training.
        features: H.
        rounds: T.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "lora_rounds"

    num_experts: int = 8
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    features: int = 16
    rounds: int = 3

    def __post_init__(self) -> None:
        for name in ("num_experts", "r"):
            check(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 1")
        check(is_positive(self.lora_alpha), "lora_alpha", self.lora_alpha, "a positive number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check(is_count(self.features), "state_features", self.features, "an integer of at least 1")
        T = self.rounds
        check(is_count(T) and T > 1, "rounds", T, "an integer of at least 2", "One round is an ordinary mixture.")

    @property
    def scaling(self) -> float:
        """The factor of `B_e n_e`."""
        return self.lora_alpha / self.r

    def check(self, config: Any) -> None:
        """Refuse anything but a router at each linear.

        Raises:
            ConfigError: With the reason.
        """
        self.check_router_at_each_linear(config, "Without a router there are no rounds.")

    def router_features(self, site: Site) -> int:
        """H: a router looks at the state."""
        return self.features

    def params(self, site: Site) -> list[Param]:
        """`A.weight` [E, R, D] and `B.weight` [E, O, R]; of the state S [H, D], V [R, H] and the GRU."""
        in_features, out_features = site.linears[""]
        E, R, H, zeros = site.num_experts, self.r, self.features, Init("zeros")
        of_gru = Init("uniform", H**-0.5)
        return [
            Param("A.weight", (E, R, in_features), Init("kaiming")),
            Param("B.weight", (E, out_features, R), zeros),
            Param("state.start", (H, in_features), Init("kaiming")),
            Param("state.back", (R, H), zeros),
            Param("state.input", (3 * H, R), of_gru),
            Param("state.hidden", (3 * H, H), of_gru),
            Param("state.input_shift", (3 * H,), zeros),
            Param("state.hidden_shift", (3 * H,), zeros),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        a_ERD, b_EOR = given.tensor("A.weight"), given.tensor("B.weight")
        x, device = given.x, given.x.device
        with no_autocast(device):
            state_TH = F.linear(x.float().flatten(0, -2), given.tensor("state.start").float())
        nodes_TER = torch.einsum("td,erd->ter", given.dropout(x.to(a_ERD.dtype)).flatten(0, -2), a_ERD)
        for t in range(self.rounds):
            gates_TE = given.route(state_TH.view(*x.shape[:-1], -1)).gates_TE()
            with no_autocast(device):
                back_TR = F.linear(state_TH, given.tensor("state.back").float())
                found_TER = gates_TE.unsqueeze(-1) * (nodes_TER.float() + back_TR.unsqueeze(1))
                if t < self.rounds - 1:
                    state_TH = self._gru(given, found_TER.sum(1), state_TH)
        made_TO = F.linear(found_TER.to(b_EOR.dtype).flatten(1), b_EOR.transpose(0, 1).flatten(1))
        y = given.base(x)
        return (y + given.scaling * made_TO.view(y.shape)).to(y.dtype)

    def _gru(self, given: ExpertInput, message_TR: Tensor, state_TH: Tensor) -> Tensor:
        """The new state, by the equations of `nn.GRUCell`."""
        names = ("input", "hidden", "input_shift", "hidden_shift")
        w_in, w_hidden, b_in, b_hidden = (given.tensor(f"state.{name}").float() for name in names)
        r_in, z_in, n_in = F.linear(message_TR, w_in, b_in).chunk(3, -1)
        r_hidden, z_hidden, n_hidden = F.linear(state_TH, w_hidden, b_hidden).chunk(3, -1)
        reset, keep = torch.sigmoid(r_in + r_hidden), torch.sigmoid(z_in + z_hidden)
        return (1 - keep) * torch.tanh(n_in + reset * n_hidden) + keep * state_TH
