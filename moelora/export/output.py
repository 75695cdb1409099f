"""What exports write: a new folder that is there whole or not at all, and an ordinary PEFT LoRA in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from moelora.errors import ExportError
from moelora.export.adapter import OpenAdapter
from moelora.files import written_folder

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@contextmanager
def output_folder(output: str | Path) -> Iterator[Path]:
    """A folder to fill, which appears at `output` when the block ends without an error.

    Raises:
        ExportError: If something is there already, or it cannot be written.
    """
    output = check_free(output)
    with written_folder(output, ExportError) as ready:
        yield ready


def check_free(output: str | Path) -> Path:
    """The output as an absolute path.

    Raises:
        ExportError: If something is there already.
    """
    output = Path(output).expanduser().absolute()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ExportError(
            f"the output {str(output)!r} exists; allowed: a folder that does not exist yet, or an empty one. Remove it "
            "or give another name; nothing was written."
        )
    return output


@dataclass(frozen=True, eq=False)
class Lora:
    """`scaling * B A` on one linear.

    Attributes:
        a_RD: A [rank, in_features].
        b_OR: B [out_features, rank].
        scaling: The factor.
    """

    a_RD: Tensor
    b_OR: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Its rank as it is stored."""
        return self.a_RD.shape[0]

    def is_zero(self) -> bool:
        """Whether it changes nothing."""
        return self.scaling == 0 or not (bool(self.a_RD.any()) and bool(self.b_OR.any()))

    def trimmed(self) -> Lora:
        """Without the last rows of A and columns of B that are 0 in both: the padding of a smaller rank."""
        alive_R = self.a_RD.any(1) | self.b_OR.any(0)
        rank = max(1, int(alive_R.nonzero().max()) + 1 if bool(alive_R.any()) else 1)
        return replace(self, a_RD=self.a_RD[:rank], b_OR=self.b_OR[:, :rank])

    def folded(self) -> Lora:
        """With the factor in B."""
        if self.scaling == 1:
            return self
        return Lora(self.a_RD, (self.b_OR.float() * self.scaling).to(self.b_OR.dtype))


def write_lora(folder: Path, loras: Mapping[str, Lora], adapter: OpenAdapter) -> None:
    """Write an ordinary PEFT LoRA: adapter_config.json and adapter_model.safetensors.

    A linear whose LoRA is 0 is left out unless all are. Where every rank and scaling is that of the adapter's experts,
    B and the words `r`, `lora_alpha` and `use_rslora` are kept; else the scaling is folded into B and alpha is the
    rank, by `rank_pattern` and `alpha_pattern` where ranks differ.

    Args:
        folder: Where; it is made.
        loras: LoRAs by the name of their linear in the base model.
        adapter: What they come from.

    Raises:
        ExportError: If there are none.
    """
    if not loras:
        raise ExportError("the adapter has no expert with a weight that is not 0; allowed: at least one.")
    kept = {name: lora for name, lora in loras.items() if not lora.is_zero()} or dict(loras)
    kept = {name: lora.trimmed() for name, lora in kept.items()}
    experts = adapter.config.experts
    words: dict[str, Any] = {"r": experts.r, "lora_alpha": experts.lora_alpha, "use_rslora": experts.use_rslora}
    if any(lora.rank != experts.r or lora.scaling != experts.scaling for lora in kept.values()):
        kept = {name: lora.folded() for name, lora in kept.items()}
        rank = Counter(lora.rank for lora in kept.values()).most_common(1)[0][0]
        others = {name: lora.rank for name, lora in kept.items() if lora.rank != rank}
        words = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": dict(others)}
    config = LoraConfig(
        **words,
        target_modules=sorted(adapter.shortest_targets(kept)),
        lora_dropout=experts.lora_dropout,
        task_type=adapter.config.task_type,
        base_model_name_or_path=adapter.base_name,
        inference_mode=True,
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, lora in kept.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = lora.a_RD.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = lora.b_OR.contiguous()
    save_tensors(tensors, folder / WEIGHTS_FILE)


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a safetensors file; tensors may share memory."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def concatenated(parts: list[tuple[float, Lora]]) -> Lora:
    """The LoRA that is a weighted sum of LoRAs on one linear: their ranks add up, weights and scalings are in its B.

    Args:
        parts: (weight, LoRA); at least one.
    """
    loras = [replace(lora, scaling=weight * lora.scaling).trimmed().folded() for weight, lora in parts]
    return Lora(torch.cat([lora.a_RD for lora in loras]), torch.cat([lora.b_OR for lora in loras], dim=1))
