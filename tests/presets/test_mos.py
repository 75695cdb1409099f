"""MoS: put together it is one LoRA a linear, forward and gradients, and it leaves and merges as one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, ExportError
from moelora.export import export_loras, to_native_moe
from tests.adapters import (
    adapted,
    assert_close_gradients,
    gradients,
    outputs,
    shake,
    small_config,
    snapshot,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close


def built(pool: torch.Tensor, ids: tuple[int, ...], shards: int) -> torch.Tensor:
    """The official code's way: the i-th shards of all vectors next to each other."""
    taken = pool[list(ids)]
    return torch.cat([taken[i::shards] for i in range(shards)], dim=1)


def pools(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """The pools by sort of linear."""
    return {
        layer.sites["default"].family: {name: getattr(layer, f"moelora_{name}")["default"].weight for name in "AB"}
        for layer in tuner_layers(model).values()
        if layer.sites["default"].member == 0
    }


def naive(model: Any, **words: Any) -> Any:
    """PEFT's LoRA whose A and B are those of the pools, differentiably."""
    config = model.peft_config["default"].experts
    layers = tuner_layers(model)
    lora_config = LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules=list(layers))
    lora = get_peft_model(tiny_model(**words), lora_config).eval()
    of = pools(model)
    for path, other in tuner_layers(lora).items():
        site = layers[path].sites["default"]
        for name, container in (("A", other.lora_A), ("B", other.lora_B)):
            weight = built(of[site.family][name], config.indices(site, name), config.shards)
            del container["default"].weight
            container["default"].weight = weight if name == "A" else weight.t()
    return lora


def test_it_equals_a_lora_of_the_shards_forward_and_gradients() -> None:
    model = adapted("mos")
    torch.testing.assert_close(outputs(model), outputs(naive(model)), rtol=1e-5, atol=1e-5)
    found = gradients(model, tiny_batch())
    model.zero_grad()
    naive(model)(**tiny_batch()).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(expected) == 14
    assert_close_gradients(found, {name: grad.clone() for name, grad in expected.items()})


def test_each_layer_has_shards_of_its_own_and_public_ones() -> None:
    experts = MoeLoraConfig.from_preset("mos", r=5, shards=2, equivalent_rank=4, private=2).experts
    model = get_peft_model(
        tiny_model(num_hidden_layers=3), MoeLoraConfig.from_preset("mos", r=5, shards=2, equivalent_rank=4, private=2)
    )
    sites = [layer.sites["default"] for path, layer in tuner_layers(model).items() if path.endswith("q_proj")]
    public = (4 - 2) * 3 * 2
    seen: list[int] = []
    for site in sites:
        for pool in "AB":
            ids = experts.indices(site, pool)
            assert len(set(ids)) == len(ids) == 5 * 2
            assert all(index < public for index in ids[:6])
            assert all(index >= public for index in ids[6:])
        assert experts.indices(site, "A")[:6] != experts.indices(site, "B")[:6]  # drawn apart
        seen += experts.indices(site, "A")[6:]
    assert sorted(seen) == list(range(public, 4 * 3 * 2))
    # what a file written today means tomorrow
    assert experts.indices(sites[1], "A")[:6] == EXPECTED


EXPECTED = (4, 6, 8, 0, 5, 11)


def test_all_private_and_one_shard_is_plain_lora() -> None:
    model = adapted("mos", r=3, equivalent_rank=3, private=3, shards=1)
    layers = tuner_layers(model)
    lora = get_peft_model(tiny_model(), LoraConfig(r=3, lora_alpha=16, target_modules=list(layers))).eval()
    of = pools(model)
    for path, other in tuner_layers(lora).items():
        site = layers[path].sites["default"]
        own = slice(3 * site.member, 3 * site.member + 3)
        other.lora_A["default"].weight.data = of[site.family]["A"][own].detach().clone()
        other.lora_B["default"].weight.data = of[site.family]["B"][own].detach().t().clone()
    assert_close("logits", outputs(model), outputs(lora), rtol=1e-5, atol=3e-6)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in lora.parameters() if p.requires_grad)


def test_it_is_exported_as_one_lora_which_merges(tmp_path: Path) -> None:
    model = adapted("mos")
    expected = outputs(model)
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(str(tmp_path / "mos"))
    for source, folder in ((model, tmp_path / "of-model"), (tmp_path / "mos", tmp_path / "of-folder")):
        export_loras(source, folder)
        lora = PeftModel.from_pretrained(tiny_model(), str(folder)).eval()
        torch.testing.assert_close(outputs(lora), expected, rtol=1e-5, atol=1e-5)
        merged = lora.merge_and_unload()
        torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ExportError):
        to_native_moe(tmp_path / "mos", tmp_path / "native")


def test_the_pools_start_as_a_lora_does_and_the_layers_share_them() -> None:
    model = get_peft_model(tiny_model(), small_config("mos"))
    for family, found in pools(model).items():
        assert found["A"].shape[0] == found["B"].shape[0] == 2 * 2 * 2, family
        assert not found["B"].any()
        full = 2 * found["A"].shape[1]
        assert 0.6 * full**-0.5 < found["A"].abs().max() <= full**-0.5
    assert len(pools(model)) == 7
    shake(model)
    first, second = (tuner_layers(model)[f"model.layers.{layer}.self_attn.q_proj"] for layer in (0, 1))
    assert second.parts["default"]["A"].tensor("weight") is first.moelora_A["default"].weight
    assert not list(second.moelora_A["default"].parameters())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shards": 5}, r"shards is 5, and '.*' has vectors of 36 features"),
        ({"r": 9, "shards": 2}, r"r is 9, of which 8 ranks come from the public shards, .* has those of 2 \(2 layers"),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(words: dict[str, Any], message: str) -> None:
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ConfigError, match=message):
        get_peft_model(base, MoeLoraConfig.from_preset("mos", **words))
    after = snapshot(base)
    assert {key: value for key, value in after.items() if key != "parameters"} == {
        key: value for key, value in before.items() if key != "parameters"
    }


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match="private is 3; allowed: 0 to 2"):
        MoeLoraConfig.from_preset("mos", private=3)
    with pytest.raises(ConfigError, match="nothing to route"):
        MoeLoraConfig(experts="shards")
