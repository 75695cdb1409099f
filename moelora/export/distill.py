"""Any mixture of LoRAs as one LoRA: an approximation, whose loss is measured.

Shape suffixes: E experts, D input features, O output features, K the ranks of all experts together, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from moelora.compose.editing.low_rank import cut
from moelora.errors import ExportError
from moelora.export.adapter import OpenAdapter, OpenSite, open_adapter
from moelora.export.mixing import fixed_gates, gates_of_zeros, weighted_parts
from moelora.export.output import Lora, check_free, concatenated, output_folder, write_lora
from moelora.export.record import export_record, write_record
from moelora.export.student import Batch, Score, Student, left_as_it_was, measured_usage
from moelora.progress import track
from moelora.routing.batch import Tokens
from moelora.validation import is_count, is_index, is_real


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What came of it.

    Attributes:
        output: Folder of the LoRA.
        rank: Its rank.
        kept: Share of the squared Frobenius norm of the usage-weighted sums that the rank keeps, over all linears.
        scores: By model, on the held-out batches; empty without them.
        num_tokens: Tokens that they were measured on.
    """

    output: Path
    rank: int
    kept: float
    scores: Mapping[str, Score] = field(default_factory=dict)
    num_tokens: int = 0

    def table(self) -> str:
        """The scores as lines for a terminal."""
        first = f"One LoRA of rank {self.rank} keeps {self.kept:.2%} of the squared norm of the usage-weighted sums."
        if not self.scores:
            return f"{first}\nWhat it loses against the mixture was not measured: that needs data."
        lines = [first, f"On {self.num_tokens:,} held-out tokens:", f"  {'':<24}{'loss':>10}{'KL to the mixture':>20}"]
        lines += [f"  {name:<24}{score.loss:>10.4f}{score.kl:>20.4f}" for name, score in self.scores.items()]
        return "\n".join(lines)


def distill_lora(
    adapter: str | Path | PeftModel,
    output: str | Path,
    *,
    rank: int,
    train: Sequence[Batch] = (),
    held_out: Sequence[Batch] = (),
    steps: int = 0,
    learning_rate: float = 3e-4,
    base: str | None = None,
    adapter_name: str = "default",
) -> Distilled:
    """Write one PEFT LoRA that stands for a whole mixture of LoRAs.

    On each linear it is `sum_e u_e s B_e A_e`, cut to `rank` by a singular value decomposition. u_e is the mean weight
    of expert e over the valid tokens of `train`; without `train`, all experts of a mixture have the same. In a
    feed-forward block the u_e are divided by their sum, since the block is inside every expert. With `steps` it is then
    trained by AdamW on `train` to lower KL(mixture || LoRA).

    It is written in fp32. It equals the mixture only for a fixed mix on linears and a rank as large as all experts'
    together, for which `export_loras` needs no rank.

    Args:
        adapter: A model with the adapter, or, without data, the folder of a saved one or its name on the Hub. The model
            is left as it was.
        output: The folder to write; it must not exist.
        rank: Rank of the LoRA.
        train: Batches to measure the usage on, and to train on.
        held_out: Batches to measure base, mixture and LoRA on.
        steps: Optimizer steps, a batch each; 0 is none.
        learning_rate: Of the first step; it falls linearly to 0.
        base: See `open_adapter`.
        adapter_name: Of a model, the name of the adapter.

    Raises:
        ExportError: For a value out of range, data without a causal language model to run, or an output that cannot be
            written. Nothing is left at `output` then.
        MoeLoraError: If the adapter does not fit the base model, or a batch lacks what the mixture routes by.
    """
    if not is_count(rank) or not is_index(steps) or not (is_real(learning_rate) and learning_rate > 0):
        raise ExportError(
            f"rank is {rank!r}, steps {steps!r}, learning_rate {learning_rate!r}; allowed: an integer of at least 1, "
            "one of at least 0, and a positive number."
        )
    if steps and not train:
        raise ExportError(f"steps is {steps}, but there is no data to train on; allowed: 0 without data.")
    check_free(output)
    opened = open_adapter(adapter, base=base, adapter_name=adapter_name)
    scores: dict[str, Score] = {}
    num_tokens = 0
    if not train and not held_out:
        loras, kept = summed_loras(opened, uniform_usage(opened), rank)
    elif isinstance(adapter, PeftModel) and opened.config.task_type in ("CAUSAL_LM", None):
        with left_as_it_was(adapter):
            adapter.eval()
            adapter.set_adapter(adapter_name)
            usage = measured_usage(adapter, opened, adapter_name, train) if train else uniform_usage(opened)
            loras, kept = summed_loras(opened, usage, rank)
            with Student(adapter, opened.config, adapter_name, rank) as student:
                student.fill(loras)
                scores, num_tokens = student.scores(held_out, f"LoRA of rank {rank}", with_others=True)
                if steps:
                    student.train(train, steps, learning_rate)
                    scores |= student.scores(held_out, f"after {steps} steps")[0]
                    loras = student.loras()
    else:
        raise ExportError(
            f"data needs a causal language model to run (this is {type(adapter).__name__}, task type "
            f"{opened.config.task_type!r}); allowed: a PEFT model with the adapter, or no data."
        )
    with output_folder(output) as folder:
        write_lora(folder, loras, opened)
        words = {name: {"loss": score.loss, "kl": score.kl} for name, score in scores.items()}
        facts = {"exact": False, "rank": rank, "kept": kept, "steps": steps, "scores": words, "tokens": num_tokens}
        write_record(folder, export_record("lora", opened.config, opened.base_name, **facts))
    return Distilled(output=Path(output), rank=rank, kept=kept, scores=scores, num_tokens=num_tokens)


def uniform_usage(adapter: OpenAdapter) -> dict[str, Tensor]:
    """The weights [E] of each site's experts where nothing is known of the inputs, by the site's name.

    Fixed weights are what they are. Else experts share equally what a router gives in all to a token of zeros, which
    tells it nothing, or 1 where it routes by facts of the batch.
    """
    fixed = fixed_gates(adapter)
    return fixed if fixed is not None else {site.name: _equal_shares(adapter, site) for site in adapter.routed}


def _equal_shares(adapter: OpenAdapter, site: OpenSite) -> Tensor:
    E = adapter.config.experts.num_experts
    total = 1.0 if adapter.config.needs else float(gates_of_zeros(site, Tokens(torch.ones(1, 1) > 0)).sum())
    return torch.full((E,), total / E)


def summed_loras(adapter: OpenAdapter, usage: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Lora], float]:
    """One LoRA for each linear, and the share of the squared norm that it keeps.

    Args:
        adapter: The adapter.
        usage: The weights [E] of each site's experts, by the site's name.
        rank: The rank that each is cut to.
    """
    blocks = {site.name for site in adapter.routed if site.is_block}
    usage = {name: u_E / u_E.sum() if name in blocks and u_E.sum() != 0 else u_E for name, u_E in usage.items()}
    loras, kept, total = {}, 0.0, 0.0
    for name, parts in track(weighted_parts(adapter, usage).items(), "cutting to the rank"):
        # in fp32, since half precision would round the weighted sum
        exact = [(weight, Lora(lora.a_RD.float(), lora.b_OR.float(), lora.scaling)) for weight, lora in parts]
        whole = concatenated(exact)
        nearest = cut(whole.a_RD, whole.b_OR, rank)
        loras[name] = Lora(nearest.a_RD, nearest.b_OR, whole.scaling)
        kept, total = kept + nearest.squared_kept, total + nearest.squared_norm
    return loras, kept / total if total > 0 else 1.0
