"""The router of one mixture: scores, then selection.

Shape suffixes: T tokens, D input features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moelora.choices import Site
from moelora.errors import ConfigError
from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scores
from moelora.selection.base import Selection
from moelora.tensors import AdapterTensors


class Router(AdapterTensors):
    """Routes tokens to experts with the tensors that its two choices declare.

    Args:
        site: Where it sits.
        scores: The choice of scores.
        selection: The choice of selection.

    Raises:
        ConfigError: If the two choices declare a tensor of the same name.
    """

    def __init__(self, site: Site, scores: Scores, selection: Selection) -> None:
        params = [*scores.params(site), *selection.params(site)]
        names = [param.name for param in params]
        if len(set(names)) < len(names):
            raise ConfigError(f"{scores.kind!r} scores and {selection.kind!r} selection both own one of {names}.")
        super().__init__(params)
        self.scores, self.selection, self.num_experts = scores, selection, site.num_experts
        # a bias without gradient is moved between forwards; repeating a forward needs the value that it had
        self.has_moving_bias = "bias" in names and not self.declared["bias"].trainable
        # modules, so that tools which switch dropout off find them
        self.dropouts = nn.ModuleDict(
            {name: nn.Dropout(p) for name, p in {**scores.dropouts(), **selection.dropouts()}.items()}
        )

    @property
    def reads_batch(self) -> bool:
        """Whether a token's routing depends on more than the token."""
        return self.selection.reads_batch or bool(self.scores.needs | self.selection.needs)

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
        tensors = {name: self.tensor(name) for name in self.pieces}
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
        tensors = {name: self.tensor(name) for name in self.pieces}
        if replaced:
            tensors |= replaced
        given = RouterInput(
            x_TD, tokens, self.num_experts, tensors, self._dropouts(), self.training, prepared_T, site_index
        )
        return self.selection.select(self.scores.score(given), given)

    def extra_repr(self) -> str:
        """The two choices."""
        return f"{self.scores.describe()}, {self.selection.describe()}"
