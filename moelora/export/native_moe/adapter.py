"""A saved adapter, read one tensor at a time.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.formats import upgrade_keys
from moelora.hub.client import CONFIG_FILE, WEIGHTS_FILE
from moelora.hub.read import local_folder, read_adapter
from moelora.ops.factors import Factors
from moelora.peft_type import PREFIX

_OF_PEFT = "base_model.model."
_TOKENS = "token_adapter.trainable_tokens_delta"


class SavedAdapter:
    """The tensors of an adapter's file by the modules of the base model that they belong to.

    Args:
        source: Its folder, or the name of a Hub repository.

    Attributes:
        folder: Where its files are.
        config: Its configuration.
        modules: For each adapted module its tensors ("A.gate", "B.gate", "router.weight") with their shapes.
        besides: Tensors of the base that it holds whole (modules saved whole, biases), with their shapes.
        tokens: Names of embeddings of which it holds the rows of some tokens.

    Raises:
        HubError: If there is no such adapter, or it is not one of moelora's.
        FormatVersionError: If it was written in a newer format.
    """

    def __init__(self, source: str | Path) -> None:
        info = read_adapter(source)
        self.folder = local_folder(source, CONFIG_FILE, WEIGHTS_FILE, "*token*", "*.jinja")
        self.source = str(source)
        self.config: MoeLoraConfig = info.config
        self._file = safe_open(self.folder / WEIGHTS_FILE, framework="pt")
        self._keys: dict[tuple[str, str], list[str]] = {}
        self.modules: dict[str, dict[str, tuple[int, ...]]] = {}
        self.besides: dict[str, tuple[int, ...]] = {}
        self.tokens: list[str] = []
        stored = upgrade_keys({key: key for key in self._file.keys()})  # noqa: SIM118 - not a dict
        for name, key in stored.items():
            self._place(name.removeprefix(_OF_PEFT), key)

    def _place(self, name: str, key: str) -> None:
        module, marker, part = name.partition(f".{PREFIX}")
        shape = tuple(self._file.get_slice(key).get_shape())
        if not marker:
            if name.endswith(f".{_TOKENS}"):
                self.tokens.append(name.removesuffix(f".{_TOKENS}") + ".weight")
            else:
                self.besides[name.replace(".base_layer.", ".")] = shape
            self._keys[name.replace(".base_layer.", "."), ""] = [key]
            return
        whole = part.removesuffix("_frozen")
        keys = self._keys.setdefault((module, whole), [])
        keys.insert(0 if part != whole else len(keys), key)  # what is frozen of a tensor comes first
        parts = self.modules.setdefault(module, {})
        before = parts.get(whole, (0,))[0]
        parts[whole] = (before + shape[0], *shape[1:])

    def tensor(self, module: str, part: str) -> Tensor:
        """One tensor; of a tensor that is frozen in part both pieces in one.

        Args:
            module: An adapted module.
            part: Its tensor, such as "A.gate".
        """
        pieces = [self._file.get_tensor(key) for key in self._keys[module, part]]
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    def beside(self, name: str) -> Tensor:
        """A tensor of the base that the adapter holds whole."""
        return self._file.get_tensor(self._keys[name, ""][0])

    def rows(self, name: str) -> tuple[list[int], Tensor]:
        """The tokens of an embedding that are trained, and their rows [tokens, D]."""
        module = name.removesuffix(".weight")
        given = self.config.trainable_token_indices
        if isinstance(given, dict):
            found = [tokens for ending, tokens in given.items() if module.endswith(ending)]
            given = found[0] if found else []
        return list(given or []), self._file.get_tensor(self._keys[f"{module}.{_TOKENS}", ""][0])

    def factor_shapes(self, module: str, role: str) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Shapes of A and B on a linear, or None if it has no experts."""
        parts, name = self.modules.get(module, {}), role or "weight"
        return (parts[f"A.{name}"], parts[f"B.{name}"]) if f"B.{name}" in parts else None

    def factors(self, module: str, role: str) -> Factors | None:
        """The low-rank factors on a linear, or None if it has no experts.

        Args:
            module: The adapted module: a linear, or a feed-forward block.
            role: "" of a linear; "gate", "up" or "down" of a block.
        """
        if self.factor_shapes(module, role) is None:
            return None
        a_ERD, b_EOR = (self.tensor(module, f"{factor}.{role or 'weight'}") for factor in "AB")
        return Factors(a_ERD, b_EOR, self.config.scaling)

    def is_routed(self, module: str) -> bool:
        """Whether a module has a router."""
        return any(part.startswith("router.") for part in self.modules[module])

    def check_router(self, module: str) -> None:
        """Refuse a mixture whose router is more than one linear of its own.

        Raises:
            ExportError: With the reason.
        """
        found = sorted(part for part in self.modules[module] if part.startswith("router."))
        if found != ["router.weight"]:
            raise ExportError(
                f"the router of {module!r} has the tensors {found}; allowed: router.weight alone. A native MoE has one "
                "linear per block as its router."
            )
