"""Scores down a tree of experts: at each node a softmax over its children (S'MoRE).

A tree of L layers has s_l experts in layer l, the leaves in layer 0. The weights of its edges stand in one row: those
of the root's children first (layer L - 1), then of each of these the children, and so on down to the leaves; E is the
number of all edges.

Shape suffixes: T tokens, F features that scores are made in, C chains of nodes from the root, S children of a node, E
edges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import NOISE_FLOOR, router_logits
from moelora.validation import check, check_bool, is_count


def levels(sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(l, number of chains that end in a parent, number of children) of each layer, from the root down."""
    found, chains = [], 1
    for layer in reversed(range(len(sizes))):
        found.append((layer, chains, sizes[layer]))
        chains *= sizes[layer]
    return found


def num_edges(sizes: Sequence[int]) -> int:
    """E."""
    return sum(chains * children for _, chains, children in levels(sizes))


def by_level(values_TE: Tensor, sizes: Sequence[int]) -> dict[int, Tensor]:
    """A row of edges as [T, C, S] of each layer."""
    counts = [chains * children for _, chains, children in levels(sizes)]
    parts = values_TE.split(counts, -1)
    return {
        layer: part.unflatten(-1, (chains, children))
        for (layer, chains, children), part in zip(levels(sizes), parts, strict=True)
    }


def check_sizes(name: str, sizes: Any) -> list[int]:
    """Refuse what is no list of counts."""
    known = isinstance(sizes, (list, tuple)) and bool(sizes) and all(map(is_count, sizes))
    check(known, name, sizes, "a list of integers of at least 1, one for each layer of the tree, leaves first")
    return list(sizes)


@dataclass(frozen=True, eq=False, kw_only=True)
class NoisyScored(Scored):
    """Scores whose logits are noisy, with what the noise was added to.

    Attributes:
        clean_TE: The logits without it.
        spread_TE: Its standard deviation.
    """

    clean_TE: Tensor
    spread_TE: Tensor


@register
@dataclass(frozen=True, kw_only=True)
class TreeScores(Scores):
    """`softmax_n(q . k_n)` over the children n of each node, `q = MLP_l(x_down, keys of the node and its ancestors)`.

    S'MoRE (arXiv 2504.06426): `x_down = W x + b` [F], keys k of each expert start at U(0, 1), MLP_l has one hidden
    layer of F with a ReLU.

    Args:
        sizes: s, the number of experts in each layer, leaves first.
        features: F.
        noise: Whether q and the keys are made of length one, and in training the logits get noise N(0, 1) times
            `softplus(W_n) + 0.01` with W_n a linear map of what MLP_l takes, which starts at 0 (S'MoRE's "noisy_topk").

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "tree_keys"

    sizes: list[int] = field(default_factory=lambda: [4, 4])
    features: int = 32
    noise: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", check_sizes("sizes", self.sizes))
        check(is_count(self.features), "key_features", self.features, "an integer of at least 1")
        check_bool("noise", self.noise)

    def check(self, config: Any) -> None:
        """Refuse other experts than the edges of the tree.

        Raises:
            ConfigError: With the reason.
        """
        E = num_edges(self.sizes)
        given = config.experts.num_experts
        check(given == E, "experts.num_experts", given, f"{E}, the edges of a tree of the sizes {self.sizes}")

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`down`, and of each layer its keys, its MLP, and with noise W_n."""
        features, depth, zeros, kaiming = self.features, len(self.sizes), Init("zeros"), Init("kaiming")
        params = [Param("down", (features, site.router_features), kaiming), Param("down_shift", (features,), zeros)]
        for layer, size in enumerate(self.sizes):
            params += [
                Param(f"keys_{layer}", (size, features), Init("unit")),
                Param(f"in_{layer}", (features, features * (depth - layer)), kaiming),
                Param(f"in_shift_{layer}", (features,), zeros),
                Param(f"out_{layer}", (features, features), kaiming),
                Param(f"out_shift_{layer}", (features,), zeros),
            ]
            if self.noise:
                params.append(Param(f"noise_{layer}", (size, features * (depth - layer)), zeros))
        return params

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        tensors = {name: tensor.float() for name, tensor in given.tensors.items()}
        x_TF = router_logits(given.x_TD, given.tensors["down"]) + tensors["down_shift"]
        keys_CK = x_TF.new_zeros(1, 0)
        logits, clean, spreads = [], [], []
        is_noisy = self.noise and given.training
        with no_autocast(x_TF.device):
            for layer, chains, children in levels(self.sizes):
                own_SF = F.normalize(tensors[f"keys_{layer}"], dim=-1) if self.noise else tensors[f"keys_{layer}"]
                of_x, of_keys = tensors[f"in_{layer}"].split([self.features, keys_CK.shape[1]], 1)
                hidden = (x_TF @ of_x.t()).unsqueeze(1) + keys_CK @ of_keys.t() + tensors[f"in_shift_{layer}"]
                q_TCF = F.relu(hidden) @ tensors[f"out_{layer}"].t() + tensors[f"out_shift_{layer}"]
                logits_TCS = (F.normalize(q_TCF, dim=-1) if self.noise else q_TCF) @ own_SF.t()
                clean.append(logits_TCS.flatten(1))
                if is_noisy:
                    of_x, of_keys = tensors[f"noise_{layer}"].split([self.features, keys_CK.shape[1]], 1)
                    spread_TCS = F.softplus((x_TF @ of_x.t()).unsqueeze(1) + keys_CK @ of_keys.t()) + NOISE_FLOOR
                    spreads.append(spread_TCS.flatten(1))
                    logits_TCS = logits_TCS + torch.randn_like(logits_TCS) * spread_TCS
                logits.append(logits_TCS)
                keys_CK = torch.cat([keys_CK.repeat_interleave(children, 0), own_SF.repeat(chains, 1)], 1)
        logits_TE = torch.cat([each.flatten(1) for each in logits], 1)
        scores_TE = torch.cat([each.softmax(-1).flatten(1) for each in logits], 1)
        probs_TE = scores_TE / sum(chains for _, chains, _ in levels(self.sizes))
        if not is_noisy:
            return Scored(logits_TE, probs_TE, scores_TE, is_softmax=False)
        return NoisyScored(
            logits_TE,
            probs_TE,
            scores_TE,
            is_softmax=False,
            clean_TE=torch.cat(clean, 1),
            spread_TE=torch.cat(spreads, 1),
        )
