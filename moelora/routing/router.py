"""The router of one mixture: scores, then selection.

Shape suffixes: T tokens, D input features, E experts, K chosen experts of a token, M experts that are switched on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from moelora.choices import Site
from moelora.errors import ConfigError
from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.selection.base import Selection
from moelora.tensors import AdapterTensors


class Router(AdapterTensors):
    """Routes tokens to experts with the tensors that its two choices declare.

    Args:
        site: Where it sits.
        scores: The choice of scores.
        selection: The choice of selection.
        elsewhere: See `AdapterTensors`.

    Attributes:
        on: Numbers of the experts that are switched on, in order; None while all are. It is not saved.

    Raises:
        ConfigError: If the two choices declare a tensor of the same name.
    """

    on: tuple[int, ...] | None = None

    def __init__(
        self,
        site: Site,
        scores: Scores,
        selection: Selection,
        elsewhere: Mapping[str, AdapterTensors] | None = None,
    ) -> None:
        params = [*scores.params(site), *selection.params(site)]
        names = [param.name for param in params]
        if len(set(names)) < len(names):
            raise ConfigError(f"{scores.kind!r} scores and {selection.kind!r} selection both own one of {names}.")
        super().__init__([param for param in params if param.name not in (elsewhere or {})], elsewhere)
        self.scores, self.selection, self.num_experts = scores, selection, site.num_experts
        self.num_null = site.num_null
        more = replace(site, num_experts=site.num_experts + 1)
        grown = {param.name: param.shape for param in selection.params(more)}
        # of the selection's tensors those with an entry for each expert
        self.per_expert = {param.name for param in selection.params(site) if grown[param.name] != param.shape}
        # a bias without gradient is moved between forwards; repeating a forward needs the value that it had
        self.has_moving_bias = "bias" in names and not self.declared["bias"].trainable
        # modules, so that tools which switch dropout off find them
        self.dropouts = nn.ModuleDict(
            {name: nn.Dropout(p) for name, p in {**scores.dropouts(), **selection.dropouts()}.items()}
        )

    def set_progress(self, share: float) -> None:
        """Say how much of the training is done, to a selection that changes with it; nothing to any other.

        Args:
            share: From 0 to 1.
        """
        if "progress" in self.declared:
            with torch.no_grad():
                self.get_parameter("progress").fill_(share)

    @property
    def reads_batch(self) -> bool:
        """Whether a token's routing depends on more than the token."""
        own = self.scores.reads_batch or self.selection.reads_batch
        return own or bool(self.scores.needs | self.selection.needs)

    @property
    def ignores_input(self) -> bool:
        """Whether the decision looks at the batch alone."""
        return self.scores.ignores_input and self.selection.ignores_input

    @property
    def is_shared(self) -> bool:
        """Whether the decision is the same in every layer: it looks at the batch alone, and every layer shares it."""
        return self.ignores_input and not self.scores.differs_by_site

    def prepare(self, hidden_BSD: Tensor) -> Tensor:
        """See `Scores.prepare`."""
        tensors = self.tensors()
        return self.scores.prepare(hidden_BSD, tensors, self._dropouts(), self.num_experts)

    def _dropouts(self) -> dict[str, Any]:
        return {name: each.p if self.training else 0.0 for name, each in self.dropouts.items()}

    def forward(
        self,
        x_TD: Tensor,
        tokens: Tokens,
        replaced: dict[str, Tensor] | None = None,
        prepared_T: Tensor | None = None,
        site_index: int = 0,
    ) -> Routing:
        """Route each token.

        Args:
            x_TD: Tokens, of any floating dtype.
            tokens: What the batch says of them.
            replaced: Tensors to use in place of the router's own, by name.
            prepared_T: What `prepare` made for these tokens, [T, ...].
            site_index: The number of the site among those that share the router.

        Returns:
            The decision, in fp32.
        """
        tensors = self.tensors()
        if replaced:
            tensors |= replaced
        given = RouterInput(
            x_TD,
            tokens,
            self.num_experts,
            tensors,
            self._dropouts(),
            self.training,
            prepared_T,
            site_index,
            self.num_null,
        )
        scored = self.scores.score(given)
        if self.on is None:
            return self.selection.select(scored, given)
        return self._among(torch.tensor(self.on, dtype=torch.long, device=x_TD.device), scored, given)

    @property
    def is_off(self) -> bool:
        """Whether all experts are switched off."""
        return self.on == ()

    def _among(self, on_M: Tensor, scored: Scored, given: RouterInput) -> Routing:
        """Select as if there were no other experts than these."""
        logits_TM, probs_TM, scores_TM = (
            each.index_select(-1, on_M) for each in (scored.logits_TE, scored.probs_TE, scored.scores_TE)
        )
        if scored.is_softmax:
            probs_TM = scores_TM = logits_TM.softmax(-1)
        else:
            probs_TM = probs_TM / probs_TM.sum(-1, keepdim=True).clamp_min(1e-9)
        bias_M = None if scored.bias_E is None else scored.bias_E.index_select(0, on_M)
        tensors = {
            name: tensor.index_select(0, on_M) if name in self.per_expert else tensor
            for name, tensor in given.tensors.items()
        }
        found = self.selection.select(
            Scored(logits_TM, probs_TM, scores_TM, scored.is_softmax, bias_M),
            replace(given, num_experts=len(on_M), tensors=tensors, num_null=self._null_among()),
        )

        def spread(values_TM: Tensor, fill: float | bool) -> Tensor:
            return torch.full_like(scored.logits_TE, fill, dtype=values_TM.dtype).index_copy(-1, on_M, values_TM)

        logits_TE, probs_TE = spread(found.logits_TE, float("-inf")), spread(found.probs_TE, 0.0)
        if found.ids_TK is not None:
            return replace(found, logits_TE=logits_TE, probs_TE=probs_TE, ids_TK=on_M[found.ids_TK])
        assigned_TE = None if found.assigned_TK is None else spread(found.assigned_TK, False)
        weights_TE = spread(found.weights_TK, 0.0)
        return replace(found, logits_TE=logits_TE, probs_TE=probs_TE, weights_TK=weights_TE, assigned_TK=assigned_TE)

    def _null_among(self) -> int:
        """How many of the experts that are switched on, the last ones, are null."""
        return sum(e >= self.num_experts - self.num_null for e in self.on or ())

    def extra_repr(self) -> str:
        """The two choices."""
        return f"{self.scores.describe()}, {self.selection.describe()}"
