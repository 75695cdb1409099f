"""Null experts: what is sent to them stays with the base model (AdaMoE).

Shape suffixes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.compose import drop_experts
from moelora.errors import ComposeError, ConfigError, ExportError
from moelora.export import to_native_moe
from moelora.ops import reference, reference_options
from moelora.routing.router import Router
from moelora.scores.linear import LinearScores
from moelora.selection.top_k import TopK
from tests.adapters import adapted, outputs, stacks, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients
from tests.routing.golden import LOGITS_TE
from tests.routing.routers import every_token, site_of

NULL: dict[str, Any] = {"experts": {"kind": "lora_with_null", "num_null": 2}}


def router(selection: TopK, E: int, num_null: int) -> Router:
    """A router whose logits are its input, and whose last experts are null."""
    found = Router(replace(site_of(E, E), num_null=num_null), LinearScores(), selection).eval()
    found.get_parameter("weight").data.copy_(torch.eye(E))
    return found


def test_golden() -> None:
    """By hand, with two null experts and k = 3: softmax(2, 1) of the first token, one LoRA of the second and third."""
    gates_TE = router(TopK(k=3), 4, 2)(LOGITS_TE, every_token(1, 3)).gates_TE()
    rows = [[0.731059, 0.268941, 0.0, 0.0], [0.377541, 0.622459, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]
    torch.testing.assert_close(gates_TE, torch.tensor(rows), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("E", "K", "num_null"), [(3, 1, 1), (5, 2, 2), (8, 4, 4), (6, 6, 3)])
def test_equals_the_reference(E: int, K: int, num_null: int) -> None:
    logits_TE = (3 * torch.randn(63, E)).requires_grad_()
    found_TE = router(TopK(k=K), E, num_null)(logits_TE, every_token(1, 63)).gates_TE()
    expected_TE = reference_options.top_k_beside_null(logits_TE, K, num_null)
    torch.testing.assert_close(found_TE, expected_TE, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found_TE.sum(-1), torch.ones(63))
    only_null_T = (found_TE[:, : E - num_null] == 0).all(-1)
    assert 0 < int(only_null_T.sum()) < 63 or num_null < K
    upstream = torch.randn(63, E)
    (grad,) = torch.autograd.grad(found_TE, logits_TE, upstream)
    (expected,) = torch.autograd.grad(expected_TE, logits_TE, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_raw_weights_are_as_they_are() -> None:
    """MoE++: what a null expert takes of the softmax is lost to the others."""
    plain = router(TopK(k=3, renormalize=False), 4, 0)(LOGITS_TE, every_token(1, 3))
    found = router(TopK(k=3, renormalize=False), 4, 2)(LOGITS_TE, every_token(1, 3))
    assert torch.equal(found.gates_TE(), plain.gates_TE())


def test_a_lora_that_the_router_next_to_rules_out_does_not_blow_up() -> None:
    gates_TE = router(TopK(k=2), 3, 1)(torch.tensor([[-60.0, -80.0, 60.0]]), every_token(1, 1)).gates_TE()
    torch.testing.assert_close(gates_TE, torch.tensor([[0.0, 0.0, 1.0]]))


def test_switching_experts_off_leaves_the_null_ones_null() -> None:
    each = router(TopK(k=3), 4, 2)
    each.on = (1, 2, 3)
    gates_TE = each(LOGITS_TE, every_token(1, 3)).gates_TE()
    torch.testing.assert_close(gates_TE, torch.tensor([[0.0, 1.0, 0.0, 0.0]]).expand(3, 4))
    each.on = (2, 3)
    gates_TE = each(LOGITS_TE, every_token(1, 3)).gates_TE()
    assert not gates_TE[:, :2].any()
    torch.testing.assert_close(gates_TE.sum(-1), torch.ones(3))


@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_a_linear_equals_the_reference(compute: str) -> None:
    """The LoRAs alone, forward and every gradient."""
    model = adapted("sira", compute=compute, num_experts=5, selection={"renormalize": True}, **NULL)
    layer = tuner_layers(model)["model.layers.0.self_attn.q_proj"]
    a_ERD, b_EOR = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    weight_ED = layer.moelora_router["default"].weight
    assert (len(a_ERD), len(b_EOR), len(weight_ED)) == (3, 3, 5)
    x_TD = (3 * torch.randn(17, 36)).requires_grad_()

    def naive() -> Tensor:
        gates_TE = reference_options.top_k_beside_null(x_TD @ weight_ED.t(), 2, 2)
        delta = reference.mixture_linear(x_TD, a_ERD, b_EOR, gates_TE[:, :3], model.peft_config["default"].scaling)
        return layer.base_layer(x_TD) + delta

    leaves = {"x": x_TD, "A": a_ERD, "B": b_EOR, "router": weight_ED}
    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_a_block_gives_what_the_base_does_to_tokens_that_chose_null_experts(compute: str) -> None:
    model = adapted("mixlora", compute=compute, num_experts=5, **NULL)
    layer = tuner_layers(model)["model.layers.0.mlp"]
    x = 3 * torch.randn(1, 40, 36)
    with torch.no_grad():
        gates_TE = reference_options.top_k_beside_null(x[0] @ layer.moelora_router["default"].weight.t(), 2, 2)
        only_null_T = ~gates_TE[:, :3].any(-1)
        assert 0 < int(only_null_T.sum()) < 40
        found, base = layer(x)[0], layer.base_layer(x)[0]
    torch.testing.assert_close(found[only_null_T], base[only_null_T], rtol=1e-4, atol=1e-5)
    assert ((found - base)[~only_null_T].abs().amax(-1) > 1e-3).all()


def test_the_loads_are_those_of_all_experts() -> None:
    model = adapted("mixlora", num_experts=5, **NULL)
    with record_routing(model) as recorder:
        outputs(model)
    assert {record.num_experts for record in recorder.records} == {5}
    assert sum(float(record.counts_E()[3:].sum()) for record in recorder.records) > 0
    a_ERD, b_EOR = stacks(tuner_layers(model)["model.layers.1.mlp"], "up")
    assert len(a_ERD) == len(b_EOR) == 5
    assert not a_ERD[3:].any()


def test_plain_loras_beside_the_mixtures_are_whole() -> None:
    layer = tuner_layers(adapted("mixlora", num_experts=5, **NULL))["model.layers.0.self_attn.q_proj"]
    assert len(layer.moelora_B["default"].weight) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_null": 0}, r"experts\.num_null is 0; allowed: 1 to 4, fewer than num_experts"),
        ({"num_null": 5}, r"experts\.num_null is 5"),
        ({"num_null": 2, "num_frozen": 4}, r"experts\.num_frozen is 4; allowed: 0 to 3, the experts with tensors"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(experts={"kind": "lora_with_null", "num_experts": 5, **words})


def test_what_edits_or_exports_experts_refuses_them(tmp_path: Path) -> None:
    model = adapted("mixlora", num_experts=5, **NULL)
    model.save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ComposeError, match="'lora_with_null' experts, some of which are null"):
        drop_experts(str(tmp_path / "a"), str(tmp_path / "b"), experts=[0])
    tiny_model().save_pretrained(tmp_path / "base")
    with pytest.raises(ExportError, match="experts is 'lora_with_null', which a native MoE cannot express"):
        to_native_moe(str(tmp_path / "a"), str(tmp_path / "c"), base=str(tmp_path / "base"))
