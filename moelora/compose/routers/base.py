"""The protocol of a recipe: which choices a composition's router is made of, and how its tensors are found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor

from moelora.choices import Choice
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.layers.base import MoeLoraLayer
from moelora.validation import check, is_count

Example = Mapping[str, Sequence[int]]
"""A tokenised row: `input_ids`, and `labels` (-100 where a token is not learnt) where it has an answer."""


@dataclass(frozen=True, eq=False)
class Composition:
    """A mixture whose experts are in place and whose router is to be found.

    Attributes:
        model: The model, with the mixture as its active adapter.
        adapter: The adapter's name.
        names: What the experts are called, in their order.
        examples: Tokenised rows by the name of the expert that they are for.
    """

    model: PeftModel
    adapter: str
    names: Sequence[str]
    examples: Mapping[str, Sequence[Example]] = field(default_factory=dict)

    @property
    def config(self) -> MoeLoraConfig:
        """The mixture's configuration."""
        config: MoeLoraConfig = self.model.peft_config[self.adapter]
        return config

    def layers(self) -> Iterator[MoeLoraLayer]:
        """The layers that hold the mixture, in the order of the model."""
        for layer in self.model.modules():
            if isinstance(layer, MoeLoraLayer) and layer.has_adapter(self.adapter):
                yield layer

    def factors(self, layer: MoeLoraLayer) -> tuple[Tensor, Tensor]:
        """A [E, R, D] and B [E, O, R] of a layer; B has its scaling in it."""
        factors = layer.lora_factors("", self.adapter)
        assert factors is not None
        return factors.a_ERD.detach(), factors.b_EOR.detach() * factors.scaling


@dataclass(frozen=True, kw_only=True)
class RouterRecipe(Choice):
    """Base of the recipes. Its fields are what a user may set."""

    axis: ClassVar[str] = "composition"
    needs_examples: ClassVar[bool] = False
    """Whether it cannot do without rows for each expert."""
    reads_examples: ClassVar[bool] = False
    """Whether it reads rows."""

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """The words of `MoeLoraConfig` for the router: scores, selection, placement.

        Args:
            num_experts: E.
            base: The base model.
        """
        raise NotImplementedError

    def for_tokenizer(self, tokenizer: Any) -> RouterRecipe:
        """This recipe with what it takes from the base's tokenizer; itself, unless it reads the form of prompts."""
        return self

    def chosen(
        self, base: Any, loras: Mapping[str, str], examples: Mapping[str, Sequence[Example]], check_base_name: bool
    ) -> Mapping[str, str]:
        """The LoRAs that become experts, in their order; all, unless it is a recipe that chooses from a pool.

        Args:
            base: The base model; it is as it was afterwards.
            loras: Sources by name.
            examples: Tokenised rows.
            check_base_name: See `from_loras`.
        """
        return loras

    def subtracted(self) -> list[str]:
        """Folders or names of LoRAs whose mean A and mean B are taken from each expert's A and B before all else."""
        return []

    def fit(self, composition: Composition) -> None:
        """Find the router's tensors; nothing for one that has none, or whose tensors start as they are declared."""

    def check_examples(self, names: Sequence[str], examples: Mapping[str, Sequence[Example]]) -> None:
        """Refuse rows for experts that are not there, and none for one that needs them.

        Raises:
            ComposeError: With the names.
        """
        unknown = sorted(set(examples) - set(names))
        if unknown:
            raise ComposeError(
                f"there are rows for {', '.join(unknown)}; allowed: the names of the experts, {', '.join(names)}."
            )
        missing = [name for name in names if not examples.get(name)]
        if self.needs_examples and missing:
            raise ComposeError(
                f"the router {self.kind!r} is fitted on rows of each expert, and there are none for "
                f"{', '.join(missing)}; allowed: at least one row each. Give a file of rows with a column `task` that "
                "names the expert.",
                anchor="no-rows",
            )


def top_k_of(kind: str, given: int | None, default: int, num_experts: int) -> int:
    """The experts of a token.

    Args:
        kind: The recipe.
        given: What was asked for; None is the default, or all experts where there are fewer.
        default: The recipe's own number.
        num_experts: E.

    Raises:
        ComposeError: If more are asked for than there are.
    """
    if given is not None and given > num_experts:
        raise ComposeError(
            f"the router {kind!r} has top_k {given}, and the mixture has {num_experts} experts; allowed: 1 to "
            f"{num_experts}, or None. Lower it, or give more LoRAs."
        )
    return min(default, num_experts) if given is None else given


def check_top_k(given: int | None) -> None:
    """Refuse what is neither a count nor None.

    Raises:
        ConfigError: With the value.
    """
    check(given is None or is_count(given), "router.top_k", given, "an integer of at least 1, or None")


def rows_with_answers(kind: str, examples: Mapping[str, Sequence[Example]]) -> list[Example]:
    """The rows of all names together.

    Args:
        kind: The recipe that learns from them.
        examples: Tokenised rows.

    Raises:
        ComposeError: If there are none, or one has no answer.
    """
    rows = [row for part in examples.values() for row in part]
    if not rows or not all(any(label != -100 for label in row.get("labels", ())) for row in rows):
        found = "one has none" if rows else "there are none"
        raise ComposeError(
            f"{kind!r} works on rows with answers, and {found}; allowed: at least one row, each with prompt and "
            "completion, or messages."
        )
    return rows
