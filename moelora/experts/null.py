"""LoRA experts with null ones beside them: what is sent to these stays with the base model.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch.nn import functional as F

from moelora.choices import Param, Site, register
from moelora.experts.lora import LoraExperts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class NullLoraExperts(LoraExperts):
    """LoRAs, and after them null experts, which add nothing and have no tensors (AdaMoE, arXiv 2406.13233).

    A router chooses among all of them, so that a token gets as many LoRAs as it needs, k at most. With a renormalised
    `top_k` the weights of a token are divided by the sum over its LoRAs, as AdaMoE does; one that chose null experts
    alone keeps the base model's output. Without `renormalize` they are as they are, as with the zero experts of MoE++
    (arXiv 2410.07348); any other selection takes a null expert as one of the rest.

    The fields are those of `LoraExperts`, where `num_experts` counts the null ones too, and:

    Args:
        num_null: How many of the experts, the last ones, are null.

    Deviations: balance losses take a null expert as any other; the paper's averages their loads (in the authors' code
    the slice that would do so takes another axis, and changes nothing). A null expert is computed as a LoRA of zeros,
    which saves no time.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "lora_with_null"
    are_alike: ClassVar[bool] = False

    num_null: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        real = self.fewest - self.num_null if is_count(self.num_null) else 0
        check(real > 0, "experts.num_null", self.num_null, f"1 to {self.fewest - 1}, fewer than num_experts")
        check(self.num_frozen <= real, "experts.num_frozen", self.num_frozen, f"0 to {real}, the experts with tensors")

    @property
    def null_experts(self) -> int:
        """See `Experts.null_experts`."""
        return self.num_null

    def counted(self, num_stored: int) -> str:
        """See `LoraExperts.counted`."""
        return f"{num_stored} and {self.num_null} null"

    def params(self, site: Site) -> list[Param]:
        """As of `LoraExperts`, of the experts that are not null."""
        return super().params(replace(site, num_experts=site.num_experts - site.num_null))

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The two stacks, with zeros for the null experts."""
        found = super().factors(parts, role, scaling, site)
        if found is None or site is None or not site.num_null:
            return found
        more = (0, 0, 0, 0, 0, site.num_null)
        return replace(found, a_ERD=F.pad(found.a_ERD, more), b_EOR=F.pad(found.b_EOR, more))
