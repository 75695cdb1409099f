"""What an adapter can be exported to, by its configuration: the exporters' own checks, without a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import check_exportable
from moelora.export.mixing import ignores_input
from moelora.export.native_moe import routing
from moelora.export.native_moe.targets import ROWS, TARGETS
from moelora.export.plain_loras import check_by_sequence
from moelora.export.tudb import write
from moelora.export.tudb.names import MODEL_TYPES

Answer = Literal["yes", "no", "depends"]


@dataclass(frozen=True)
class ExportTarget:
    """One form that an adapter may be exported to.

    Attributes:
        command: The options of `moelora export`.
        answer: Whether it can be; "depends" is on what the configuration does not say.
        words: What it becomes, what it depends on, or why it cannot be.
    """

    command: str
    answer: Answer
    words: str


def export_targets(config: MoeLoraConfig, *, is_routed: bool = True) -> list[ExportTarget]:
    """What an adapter can be exported to.

    Args:
        config: Its configuration.
        is_routed: Whether it has any mixture.
    """
    checks: dict[str, Callable[[MoeLoraConfig, bool], tuple[Answer, str]]] = {
        "--to native-moe": _native_moe,
        "--to lora": _loras,
        "--to lora --rank R": _one_lora,
        "--to mixlora": _mixlora,
    }
    found = []
    for command, check in checks.items():
        try:
            answer, words = check(config, is_routed)
        except ExportError as error:
            answer, words = "no", str(error)
        found.append(ExportTarget(command, answer, words))
    return found


def _native_moe(config: MoeLoraConfig, is_routed: bool) -> tuple[Answer, str]:
    if not is_routed:
        raise ExportError("the adapter has no mixture, so there is nothing to route.")
    routing.check_choices(config)
    words = f"one native mixture-of-experts model where the base model is one of {', '.join(ROWS)}"
    if not config.selection.renormalize and config.selection.k < config.experts.num_experts:
        say_so = [target.architecture for target in TARGETS if target.norm_topk_prob]
        words += f", and becomes one of {', '.join(say_so)}: weights that are not renormalised need that"
    return "depends", words


def _loras(config: MoeLoraConfig, is_routed: bool) -> tuple[Answer, str]:
    check_exportable(config)
    is_block = is_routed and config.placement.kind == "feed_forward"
    if not is_routed or (not config.needs and ignores_input(config)):
        if is_block:
            return "depends", "one LoRA where the fixed weights choose one feed-forward expert"
        return "yes", "one LoRA with the same outputs"
    if check_by_sequence(config) == "task":
        if is_block and hasattr(config.scores, "num_tasks"):
            return "depends", "LoRAs where the table gives each task one feed-forward expert"
        return "yes", "a LoRA for each expert, by the task's number, with the same outputs"
    if config.placement.routers != "per_model":
        return "depends", "LoRAs and a router of requests where the routers of all sites are equal"
    return "yes", "a LoRA for each expert and a router of requests, with the same outputs"


def _one_lora(config: MoeLoraConfig, is_routed: bool) -> tuple[Answer, str]:
    check_exportable(config)
    return "yes", "one LoRA that approximates it"


def _mixlora(config: MoeLoraConfig, is_routed: bool) -> tuple[Answer, str]:
    check_exportable(config)
    if not is_routed:
        raise ExportError("the adapter has no mixture, and MixLoRA's code routes every layer.")
    write.check_choices(config)
    return "depends", (
        f"a folder of MixLoRA's authors where the base model is one of {', '.join(MODEL_TYPES)} and every layer has "
        "the same targets"
    )
