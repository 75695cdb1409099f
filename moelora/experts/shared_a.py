"""LoRA experts that share one A (HydraLoRA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moelora.choices import Site, register
from moelora.experts.lora import LoraExperts


@register
@dataclass(frozen=True, kw_only=True)
class SharedALoraExperts(LoraExperts):
    """One A for all experts and a B for each (HydraLoRA, arXiv 2404.19245): `scaling * B_e A x`.

    The fields are those of `LoraExperts`. `r` is the rank of A and of each B.
    """

    kind: ClassVar[str] = "lora_shared_a"

    def _num_a(self, site: Site) -> int:
        return 1
