"""The one LoRA that is to stand for a mixture, on the mixture's own model: measured against it, trained towards it.

Shape suffixes: T tokens, V vocabulary, E experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import OpenAdapter, open_sites
from moelora.export.output import Lora
from moelora.layers.base import MoeLoraLayer
from moelora.progress import track
from moelora.routing.batch import FACTS
from moelora.routing.run import batch_facts, record_routing

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask` and, where there are any, `labels` and what the mixture routes by (`task_ids`, ...)."""


@dataclass(frozen=True)
class Score:
    """What one model gives on held-out tokens.

    Attributes:
        loss: Mean cross-entropy of a token, in nats.
        kl: Mean of KL(mixture || model) over the same tokens, in nats.
    """

    loss: float
    kl: float


@contextmanager
def left_as_it_was(model: PeftModel) -> Iterator[None]:
    """Restore a model's active adapters, trainable parameters and training modes."""
    active = list(model.base_model.active_adapters)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    try:
        yield
    finally:
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name])
        for name, module in model.named_modules():
            module.training = modes[name]


@torch.no_grad()
def measured_usage(
    model: PeftModel, adapter: OpenAdapter, adapter_name: str, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """The mean weights [E] of each site's experts over the valid tokens of batches, by the site's name."""
    E = adapter.config.experts.num_experts
    sums = {site.name: torch.zeros(E) for site in adapter.routed}
    counts = dict.fromkeys(sums, 0)
    with record_routing(model) as listener:
        for batch in track(batches, "measuring usage"):
            _logits(model, batch)
            for record in listener.records:
                if record.adapter == adapter_name:
                    gates_TE = record.routing.gates_TE()[record.valid_T]
                    sums[record.layer] += gates_TE.sum(0).float().cpu()
                    counts[record.layer] += len(gates_TE)
            listener.clear()
    return {name: sum_E / max(1, counts[name]) for name, sum_E in sums.items()}


class Student:
    """An adapter with one expert that is always chosen, at the sites of a mixture; gone when its block ends.

    Args:
        model: A model with the mixture, in eval mode.
        config: The mixture's configuration.
        adapter_name: The mixture's name.
        rank: Rank of the LoRA.
    """

    def __init__(self, model: PeftModel, config: MoeLoraConfig, adapter_name: str, rank: int) -> None:
        self.model, self.teacher = model, adapter_name
        self.name = next(
            name for name in (f"distilled_{n}" for n in itertools.count()) if name not in model.peft_config
        )
        self.config = MoeLoraConfig(
            experts={"kind": "lora", "num_experts": 1, "r": rank, "lora_alpha": rank},
            placement=replace(config.placement, routers="per_site"),
            scores="constant",
            selection="dense",
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            task_type=config.task_type,
        )

    def __enter__(self) -> Student:
        self.model.add_adapter(self.name, self.config)
        self.model.eval()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.model.set_adapter(self.teacher)
        self.model.delete_adapter(self.name)

    @torch.no_grad()
    def fill(self, loras: Mapping[str, Lora]) -> None:
        """Set its factors.

        Args:
            loras: LoRAs of its rank by the names of their linears; the others are 0.
        """
        layers = {layer.name: layer for layer in self.model.modules() if isinstance(layer, MoeLoraLayer)}
        for site in open_sites(self.model.get_base_model(), self.name):
            for role, linear in site.linears.items():
                parts, lora = layers[site.name].parts[self.name], loras.get(linear)
                a, b = (parts[part].get_parameter(role or "weight") for part in ("A", "B"))
                a.copy_(lora.a_RD.unsqueeze(0) if lora is not None else torch.zeros_like(a))
                b.copy_(lora.b_OR.unsqueeze(0) if lora is not None else torch.zeros_like(b))

    def loras(self) -> dict[str, Lora]:
        """Its factors by the names of their linears."""
        return {
            linear: Lora(site.factors[role].a_ERD[0], site.factors[role].b_EOR[0])
            for site in open_sites(self.model.get_base_model(), self.name)
            for role, linear in site.linears.items()
        }

    @torch.no_grad()
    def scores(self, batches: Sequence[Batch], name: str, *, with_others: bool = False) -> tuple[dict[str, Score], int]:
        """Loss and KL by model, and the number of tokens; empty without batches.

        Args:
            batches: Held-out batches.
            name: What the LoRA is called.
            with_others: Whether the base model and the mixture are measured as well.
        """
        sums: dict[str, list[float]] = {}
        count = 0
        for batch in track(batches, "measuring losses"):
            targets_T = _targets(batch)
            with self._running(self.teacher):
                teacher_TV = _predictions(self.model, batch)
            models = {name: self.name}
            if with_others:
                models = {"base model": "", "mixture": self.teacher, **models}
            for label, adapter in models.items():
                with self._running(adapter):
                    log_TV = _predictions(self.model, batch)
                loss, kl = F.nll_loss(log_TV, targets_T.to(log_TV.device), reduction="sum"), _kl(teacher_TV, log_TV)
                seen = sums.setdefault(label, [0.0, 0.0])
                seen[0], seen[1] = seen[0] + float(loss), seen[1] + float(kl)
            count += len(targets_T)
        if batches and count == 0:
            raise ExportError("the held-out rows have no token to predict; allowed: rows of at least two tokens.")
        return {label: Score(loss / count, kl / count) for label, (loss, kl) in sums.items()}, count

    def train(self, batches: Sequence[Batch], steps: int, learning_rate: float) -> None:
        """Lower the mean KL(mixture || LoRA) of a token by AdamW, one batch a step.

        Args:
            batches: Taken in turn.
            steps: Number of steps.
            learning_rate: Of the first step; it falls linearly to 0.
        """
        own = f".{self.name}."
        parameters = [parameter for name, parameter in self.model.named_parameters() if own in name]
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        for step, batch in zip(track(range(steps), "distilling"), itertools.cycle(batches), strict=False):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
            with self._running(self.teacher), torch.no_grad():
                teacher_TV = _predictions(self.model, batch)
            with self._running(self.name):
                log_TV = _predictions(self.model, batch)
                loss = _kl(teacher_TV, log_TV) / max(1, len(log_TV))
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()

    @contextmanager
    def _running(self, adapter: str) -> Iterator[None]:
        """Run the model with one adapter, or with none for ""."""
        if adapter:
            self.model.set_adapter(adapter)
            yield
            return
        with self.model.disable_adapter():
            yield


def _logits(model: PeftModel, batch: Batch) -> Tensor:
    device = model.get_input_embeddings().weight.device
    inputs: dict[str, Any] = {name: tensor.to(device) for name, tensor in batch.items() if name not in FACTS}
    with batch_facts(**{name: batch[name].to(device) for name in FACTS if name in batch}):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _labels(batch: Batch) -> Tensor:
    """The label of each token but the first, -100 where there is none."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return labels[:, 1:]


def _targets(batch: Batch) -> Tensor:
    labels = _labels(batch)
    return labels[labels != -100]


def _predictions(model: PeftModel, batch: Batch) -> Tensor:
    """Log-probabilities of what follows, in fp32, where there is a label."""
    logits_BSV = _logits(model, batch)[:, :-1]
    return logits_BSV[(_labels(batch) != -100).to(logits_BSV.device)].float().log_softmax(-1)


def _kl(teacher_TV: Tensor, student_TV: Tensor) -> Tensor:
    return F.kl_div(student_TV, teacher_TV, reduction="sum", log_target=True)
