"""Mixture-of-experts blocks of the base model: found by structure, refused by name, never adapted in part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from moelora import MoeLoraConfig
from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules
from moelora.inject.moe_blocks import MoeBlock, exclusion, find_moe_blocks
from tests.adapters import shake, small_config, snapshot, tuner_layers
from tests.conftest import MODEL_NAMES, tiny_batch, tiny_model
from tests.inject.bases import MOE, seeded

# Name of the first block, its parts, and in how many layers there is one.
EXPECTED: dict[str, tuple[str, set[str], int]] = {
    "mixtral": ("model.layers.0.mlp", {"mlp.experts", "mlp.gate"}, 3),
    "qwen2_moe": (
        "model.layers.0.mlp",
        {"mlp.experts", "mlp.gate", "mlp.shared_expert", "mlp.shared_expert_gate"},
        3,
    ),
    "qwen3_moe": ("model.layers.1.mlp", {"mlp.experts", "mlp.gate"}, 2),
    "olmoe": ("model.layers.0.mlp", {"mlp.experts", "mlp.gate"}, 3),
    "deepseek_v3": ("model.layers.1.mlp", {"mlp.experts", "mlp.gate", "mlp.shared_experts"}, 2),
    "gpt_oss": ("model.layers.0.mlp", {"mlp.experts", "mlp.router"}, 3),
    "llama4": ("model.layers.1.feed_forward", {f"feed_forward.{x}" for x in ("experts", "router", "shared_expert")}, 1),
    "qwen3_next": (
        "model.layers.0.mlp",
        {"mlp.experts", "mlp.gate", "mlp.shared_expert", "mlp.shared_expert_gate"},
        3,
    ),
    # a whole decoder layer: its attention does not belong to the block
    "gemma4": ("model.layers.0", {"0.experts", "0.router", "0.mlp"}, 3),
    "granitemoeshared": (
        "model.layers.0.block_sparse_moe",
        {"block_sparse_moe.experts", "block_sparse_moe.router", "0.shared_mlp"},
        3,
    ),
    "jetmoe": ("model.layers.0.mlp", {"mlp.input_linear", "mlp.router"}, 6),
    "dbrx": ("transformer.blocks.0.ffn", {"ffn.experts", "ffn.router"}, 2),
    "switch": ("encoder.block.1.layer.1.mlp", {"mlp.experts", "mlp.router"}, 2),
}


def blocks_of(model: nn.Module) -> list[MoeBlock]:
    return find_moe_blocks(dict(base_modules(model)))


@pytest.mark.parametrize("name", MOE)
def test_the_blocks_are_found_with_all_their_parts(name: str) -> None:
    first, parts, number = EXPECTED[name]
    blocks = blocks_of(seeded(MOE[name]))
    assert blocks[0].name == first
    assert {".".join(part.rsplit(".", 2)[-2:]) for part in blocks[0].parts} == parts
    assert len(blocks) == number


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_dense_models_have_none(name: str) -> None:
    assert not blocks_of(tiny_model(name))


def test_an_adapter_on_the_model_is_not_taken_for_a_block() -> None:
    for preset in ("mixlora", "sira"):
        model = get_peft_model(tiny_model(), small_config(preset))
        assert not blocks_of(model.get_base_model())


class Expert(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6))


class HandMade(nn.Module):
    """A block with plain words: a router and a list of experts."""

    def __init__(self, experts: int = 3, choices: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(6, choices)
        self.parts = nn.ModuleList(Expert() for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        y: Tensor = sum(weights[..., [i]] * part(x) for i, part in enumerate(self.parts))
        return y


class Mixer(nn.Module):
    """No block: a stack of equal layers, and a head with as many outputs as there are layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Sequential(nn.Linear(6, 6)) for _ in range(3)), nn.Linear(6, 3)


class Gates(nn.Module):
    """No block: parameters stacked by head, as recurrent layers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.Parameter(torch.zeros(3, 2, 2))
        self.out_proj = nn.Linear(6, 6)


def test_structure_decides() -> None:
    (block,) = blocks_of(nn.ModuleDict({"deep": HandMade()}))
    assert block.parts == ("deep.parts", "deep.router")
    assert (block,) == tuple(blocks_of(nn.ModuleDict({"deep": HandMade(), "wide": Mixer(), "gates": Gates()})))
    assert not blocks_of(Mixer())
    assert not blocks_of(nn.ModuleList([nn.Conv1d(4, 6, 3), nn.Linear(5, 6)]))


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
@pytest.mark.parametrize("name", MOE)
def test_all_linear_is_refused_by_name_and_works_with_what_the_message_says(name: str, preset: str) -> None:
    model = seeded(MOE[name])
    kind = {"task_type": "SEQ_2_SEQ_LM" if name == "switch" else "CAUSAL_LM"}
    before = snapshot(model)
    with pytest.raises(TargetError) as error:
        get_peft_model(model, small_config(preset, **kind))
    assert snapshot(model) == before
    assert f"block {EXPECTED[name][0]!r}" in str(error.value)
    pattern = exclusion(blocks_of(model))
    assert f"exclude_modules={pattern!r}" in str(error.value)
    config = small_config(preset, **kind, exclude_modules=pattern)
    if preset == "mixlora" and name not in ("qwen3_moe", "deepseek_v3", "llama4", "switch"):
        # no dense block is left; a layer of gemma 4 itself has two linears and an activation
        message = "its forward cannot be followed" if name == "gemma4" else "none of the targeted linears is in a feed-"
        with pytest.raises(TargetError, match=message):
            get_peft_model(model, config)
        assert snapshot(model) == before
        return
    batch = tiny_batch()
    with torch.no_grad():
        expected = model(**batch).logits
    count = config.num_trainable_parameters(model)
    adapted = get_peft_model(model, config).eval()
    assert sum(p.numel() for p in adapted.parameters() if p.requires_grad) == count
    parts = [part for block in blocks_of(model) for part in block.parts]
    assert not [site for site in tuner_layers(adapted) if any(f"{site}.".startswith(f"{part}.") for part in parts)]
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    shake(adapted)
    adapted.train()(**tiny_batch(batch_size=6, length=30)).loss.backward()
    unmoved = [n for n, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not unmoved


def test_attention_by_name_needs_no_exclusion_and_is_saved_and_loaded(tmp_path: Any) -> None:
    words: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(seeded(MOE["mixtral"]), small_config("sira", **words)).eval()
    shake(model)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(seeded(MOE["mixtral"]), str(tmp_path)).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits)
    model.add_adapter("second", small_config("sira", target_modules=r".*self_attn\.(q|k)_proj"))
    assert len(tuner_layers(model)) == 9


MLP = r"'model\.layers\.0\.mlp"


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("qwen2_moe", {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
         rf"target {MLP}\.shared_expert\.gate_proj' is in the mixture-of-experts block {MLP}' .* exclude_modules="),
        ("qwen2_moe", {"target_modules": ["q_proj", "shared_expert_gate"]}, rf"{MLP}\.shared_expert_gate' is in the"),
        ("mixtral", {"target_modules": ["experts"]}, rf"target {MLP}\.experts' is in the mixture-of-experts block"),
        ("gemma4", {"target_modules": ["q_proj", "down_proj"]}, rf"{MLP}\.down_proj' is in the mixture-of"),
        ("granitemoeshared", {"target_modules": ["input_linear"]}, r"0\.shared_mlp\.input_linear' is in the mix"),
        ("llama4", {"target_modules": ["router"]}, r"'model\.layers\.1\.feed_forward\.router' is in the mixture-of"),
        ("dbrx", {"target_modules": r".*router\.layer"}, r"'transformer\.blocks\.0\.ffn\.router\.layer' is in the mix"),
        # names that only the stacked experts have
        ("mixtral", {"target_modules": ["q_proj", "down_proj"]}, r"'down_proj' match no module, but the model has the"),
        # the first layer has a dense block of this name
        ("qwen3_moe", {"target_modules": ["down_proj"]}, rf"{MLP}\.down_proj' is in a dense feed-forward .* pass by"),
    ],
)  # fmt: skip
def test_targets_in_or_beside_a_block_are_refused_by_name(name: str, words: dict[str, Any], message: str) -> None:
    model = seeded(MOE[name])
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        get_peft_model(model, small_config("sira", **words))
    assert snapshot(model) == before


def test_half_an_exclusion_is_refused() -> None:
    model = seeded(MOE["qwen2_moe"])
    with pytest.raises(TargetError, match="all-linear' takes in the mixture-of-experts block"):
        get_peft_model(model, small_config("sira", exclude_modules=r".*shared_expert.*"))
    with pytest.raises(TargetError, match="all-linear' takes in the mixture-of-experts block"):
        get_peft_model(model, small_config("sira", exclude_modules=["experts"]))


def test_dense_blocks_of_a_mixed_model_when_the_others_are_left_out() -> None:
    model = seeded(MOE["qwen3_moe"])
    words: dict[str, Any] = {"exclude_modules": exclusion(blocks_of(model)), "target_modules": ["up_proj", "down_proj"]}
    assert set(tuner_layers(get_peft_model(model, small_config("mixlora", **words)))) == {"model.layers.0.mlp"}


def test_a_network_of_ones_own() -> None:
    model = nn.ModuleDict({"moe": HandMade(), "out": nn.Linear(6, 2)})
    with pytest.raises(TargetError, match=r"block 'moe' \(experts: 'moe.parts'\)"):
        get_peft_model(model, MoeLoraConfig())
    config = MoeLoraConfig(exclude_modules=exclusion(blocks_of(model)))
    assert set(tuner_layers(get_peft_model(model, config))) == {"out"}
