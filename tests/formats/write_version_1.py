"""Write the fixture adapters of format version 1, and what they give.

The files in `version_1/` were written by this program at commit ca2d1e7, the last one that wrote that format (torch
2.13, one CPU thread). It is kept to show where they come from and which words made them; it refuses to run with a
library that writes another version.

    python -m tests.formats.write_version_1
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from moelora import MoeLoraConfig
from tests.adapters import outputs, shake, task_type
from tests.conftest import tiny_model

FOLDER = Path(__file__).parent / "version_1"
# Odd and small: the largest file stays near 40 KB.
SMALL: dict[str, dict[str, Any]] = {
    "mixlora": {"r": 2, "num_experts": 3, "top_k": 2},
    "sira": {"r": 2, "num_experts": 3, "top_k": 2},
    "smora": {"r": 5, "top_k": 2},
    "molora": {"r": 2, "num_experts": 3},
    "random_router": {"r": 2, "num_experts": 3, "top_k": 2},
    "lora": {"r": 3},
}


@dataclass(frozen=True)
class Fixture:
    """One folder: an adapter of a tiny model.

    Attributes:
        preset: The preset.
        model: Name of the tiny model.
        words: Words besides the small ones.
        train: Whether it draws nothing in training mode, so that its logits there are kept too.
    """

    preset: str
    model: str = "llama"
    words: dict[str, Any] = field(default_factory=dict)
    train: bool = False

    def config(self) -> MoeLoraConfig:
        """Its configuration, made of words."""
        words = {"task_type": task_type(self.model), **SMALL[self.preset], **self.words}
        return MoeLoraConfig.from_preset(self.preset, **words)


_ATTENTION_AND_BLOCK = ["q_proj", "gate_proj", "up_proj", "down_proj"]
FIXTURES: dict[str, Fixture] = {
    "mixlora": Fixture("mixlora"),
    "sira": Fixture("sira"),
    "smora": Fixture("smora", train=True),
    "molora": Fixture("molora", train=True),
    "random_router": Fixture("random_router"),
    "lora": Fixture("lora", train=True),
    "mixlora_bert": Fixture("mixlora", "bert"),
    "mixlora_t5": Fixture("mixlora", "t5"),
    "mixlora_gpt2": Fixture("mixlora", "gpt2"),
    "mixlora_phi3": Fixture("mixlora", "phi3"),
    "mixlora_gemma3_text": Fixture("mixlora", "gemma3_text"),
    "sira_gpt2": Fixture("sira", "gpt2", {"expert_dropout": 0.0, "lora_dropout": 0.1}),
    "smora_phi3": Fixture("smora", "phi3", {"bias_update_rate": 0.0}, train=True),
    "sira_capacity": Fixture("sira", words={"expert_dropout": 0.0, "capacity_factor": 0.5}, train=True),
    "sira_capacity_in_eval": Fixture("sira", words={"capacity_in_eval": True, "capacity_factor": 0.5}),
    "sira_no_capacity": Fixture("sira", words={"capacity_factor": None, "renormalize": True}),
    "mixlora_bias": Fixture("mixlora", "gpt2", {"bias": "moelora_only"}),
    "mixlora_lm_head": Fixture("mixlora", words={"modules_to_save": ["lm_head"]}),
    "mixlora_embedding": Fixture(
        "mixlora", words={"modules_to_save": ["embed_tokens"], "lora_dropout": 0.0}, train=True
    ),
    "mixlora_rslora": Fixture("mixlora", words={"use_rslora": True, "lora_alpha": 5}),
    "mixlora_pooled": Fixture(
        "mixlora",
        words={"balance_loss": "mixtral", "balance_coef": 1e-3, "z_loss_coef": 1e-4, "balance_scope": "micro_batch"},
    ),
    "mixlora_up_only": Fixture("mixlora", words={"target_modules": ["up_proj"]}),
    "mixlora_compiled": Fixture("mixlora", words={"compute": {"implementation": "compiled"}}),
    "mixlora_one_layer": Fixture("mixlora", words={"target_modules": _ATTENTION_AND_BLOCK, "layers_to_transform": [1]}),
    "mixlora_without_gate": Fixture("mixlora", words={"exclude_modules": ["gate_proj"], "router_init_std": 0.1}),
    "two_adapters": Fixture("mixlora"),
}
# The second adapter of "two_adapters", in a folder below it.
SECOND = Fixture("mixlora", words={"num_experts": 4, "r": 1, "top_k": 3, "target_modules": ["up_proj", "q_proj"]})


def move(model: Any, seed: int) -> None:
    """Give all that is trained a value of its own: the adapters' tensors, biases and modules of the base."""
    shake(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "moelora_" not in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def expected(fixture: Fixture, model: Any) -> dict[str, Tensor]:
    """Logits of the tiny batch, in eval mode and, where nothing is drawn, in training mode too."""
    logits = {"logits": outputs(model.eval(), fixture.model)}
    if fixture.train:
        logits["logits_train"] = outputs(model.train(), fixture.model)  # last: smora's bias moves after it
    model.eval()
    return logits


def write(name: str, fixture: Fixture) -> None:
    """Write one folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    model = get_peft_model(tiny_model(fixture.model), fixture.config())
    move(model, seed=len(name))
    if name == "two_adapters":
        model.add_adapter("second", SECOND.config())
        move(model, seed=2)
    model.save_pretrained(str(folder))
    logits = expected(fixture, model)
    if name == "two_adapters":
        for key, active in (("logits_second", "second"), ("logits_both", ["default", "second"])):
            model.base_model.set_adapter(active)
            logits[key] = outputs(model.eval())
    save_file(logits, folder / "expected.safetensors")
    for card in folder.rglob("README.md"):
        card.unlink()


def main() -> None:
    """Write all of them."""
    version = MoeLoraConfig.from_preset("lora").format_version
    if version != 1:
        raise SystemExit(f"this library writes format version {version}; the fixtures are of version 1 and stay.")
    torch.set_num_threads(1)
    for name, fixture in FIXTURES.items():
        write(name, fixture)


if __name__ == "__main__":
    main()
