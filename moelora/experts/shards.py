"""LoRAs that are put together of shards of pools which all layers share (MoS).

Shape suffixes: N shards of a pool, L shards of a vector, R rank, D input features, O output features.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.experts.base import Experts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, check_bool, is_count, is_index, is_positive, is_share


@register
@dataclass(frozen=True, kw_only=True)
class ShardExperts(Experts):
    """One LoRA for each linear, of shards of two pools (MoS, arXiv 2410.00938): `scaling * B_k A_k x`.

    The linears of one sort (same name and sizes, in all layers) share a pool of shards for A and one for B. Which
    shards the layer k takes is drawn once from `seed`, for A and B apart, and does not depend on the input. `private`
    of its ranks are made of shards that no other layer takes.

    Args:
        r: Rank that is built at each linear.
        lora_alpha, lora_dropout, use_rslora: As of `LoraExperts`.
        equivalent_rank: e; the pools hold as many parameters as LoRAs of this rank.
        shards: L, the number of shards that a vector of A or B is made of; it divides the features of every linear.
        private: p, of the r ranks those made of shards of the layer's own.
        seed: Seed of the draws.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "shards"
    is_low_rank: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True

    num_experts: int = 1
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    equivalent_rank: int = 2
    shards: int = 4
    private: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.num_experts == 1, "experts.num_experts", self.num_experts, "1 with 'shards' experts")
        for name in ("r", "equivalent_rank", "shards"):
            check(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 1")
        check(is_positive(self.lora_alpha), "lora_alpha", self.lora_alpha, "a positive number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check_bool("use_rslora", self.use_rslora)
        check(is_index(self.seed), "seed", self.seed, "an integer of at least 0")
        most = min(self.r, self.equivalent_rank)
        within = is_index(self.private) and self.private <= most
        check(within, "private", self.private, f"0 to {most}, the smaller of r and equivalent_rank")

    @property
    def scaling(self) -> float:
        """The factor of `B A x`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def check(self, config: Any) -> None:
        """Refuse a router: the shards are fixed.

        Raises:
            ConfigError: With the reason.
        """
        placement = config.placement
        check(
            placement.kind == "linear" and placement.unrouted_modules == ".*",
            "placement",
            placement.describe(),
            "{'kind': 'linear', 'unrouted_modules': '.*'} with 'shards' experts",
            "The shards are fixed, so that there is nothing to route.",
        )

    def check_site(self, site: Site) -> None:
        """See `Choice.check_site`."""
        for features in site.linears[""]:
            if features % self.shards:
                raise ConfigError(
                    f"shards is {self.shards}, and {site.name!r} has vectors of {features} features; allowed: a number "
                    "that divides them. Leave the linear out with exclude_modules, or take shards=1."
                )
        public = (self.equivalent_rank - self.private) * site.num_members
        if self.r - self.private > public:
            raise ConfigError(
                f"r is {self.r}, of which {self.r - self.private} ranks come from the public shards, and the pool of "
                f"{site.name!r} has those of {public} ({site.num_members} layers share it); allowed: up to "
                f"{public + self.private}. Raise equivalent_rank, or lower r."
            )

    def site_phrase(self, num_experts: int, routed: bool = True, roles: Sequence[str] = ()) -> str:
        """See `Experts.site_phrase`."""
        return f"pools of shards, for a LoRA of rank {self.r} at each linear of the sort"

    def params(self, site: Site) -> list[Param]:
        """The pools: A [N, D / L], which starts as rows of D features would, and B [N, O / L] of zeros."""
        in_features, out_features = site.linears[""]
        L = self.shards
        N = self.equivalent_rank * site.num_members * L
        init = Init("uniform", 1 / math.sqrt(max(in_features, 1)))
        return [
            Param("A.weight", (N, in_features // L), init, shared=site.family),
            Param("B.weight", (N, out_features // L), Init("zeros"), shared=site.family),
        ]

    def indices(self, site: Site, pool: str) -> tuple[int, ...]:
        """Which shards make the vectors at a site: R times L numbers, those of the public ranks first.

        Args:
            site: The place.
            pool: "A" or "B".
        """
        L, own = self.shards, self.private * self.shards
        public = (self.equivalent_rank - self.private) * site.num_members * L
        drawn = _draw(public, (self.r - self.private) * L, f"{self.seed} {site.family} {site.member} {pool}")
        first = public + site.member * own
        return (*drawn, *range(first, first + own))

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The LoRA of the site, put together."""
        if role or site is None:
            return None
        a_RD, b_RO = (self._built(parts[pool].tensor("weight"), site, pool) for pool in ("A", "B"))
        return Factors(a_RD.unsqueeze(0), b_RO.t().unsqueeze(0), scaling)

    def _built(self, pool_NF: Tensor, site: Site, pool: str) -> Tensor:
        ids = torch.tensor(self.indices(site, pool), device=pool_NF.device)
        return pool_NF[ids].view(self.r, -1)


@torch.compiler.assume_constant_result  # else torch.compile, which looks through a cache, would trace the sort
def _draw(total: int, count: int, words: str) -> tuple[int, ...]:
    """`count` different numbers below `total`, the same in every version of Python and torch."""
    return _drawn(total, count, words)


@lru_cache(maxsize=4096)
def _drawn(total: int, count: int, words: str) -> tuple[int, ...]:
    generator = random.Random(words)
    keys = [generator.random() for _ in range(total)]
    return tuple(sorted(range(total), key=keys.__getitem__)[:count])
