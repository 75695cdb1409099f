"""S'MoRE's noisy gate: the logits, the chances, and the losses of importance and load.

Shape suffixes: T tokens, C chains of nodes from the root, S children of a node.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig, balance_losses, record_routing
from moelora.balance.cv_squared import TreeCvSquaredBalance, cv_squared
from moelora.errors import ConfigError
from moelora.ops import reference_options
from moelora.routing.router import Router
from moelora.scores.base import RouterInput
from moelora.scores.tree import NoisyScored, TreeScores, by_level
from moelora.selection.tree import NoisyTreeRouting, TreeTop, chance_of_top
from tests.adapters import adapted, gradients, tuner_layers
from tests.conftest import tiny_batch
from tests.ops.compare import assert_close
from tests.ops.compare import gradients as gradients_of
from tests.routing.routers import every_token, new_router

SCORES, TOP = TreeScores(sizes=[3, 4], features=5, noise=True), TreeTop(sizes=[3, 4], fan_out=[1, 2], raw_single=True)


def shaken() -> Router:
    router = new_router(TOP, SCORES, num_experts=16).train()
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def noisy(router: Router, x_TD: Tensor) -> NoisyScored:
    torch.manual_seed(4)
    given = RouterInput(x_TD, every_token(1, len(x_TD)), 16, router.tensors(), {}, training=True)
    scored = SCORES.score(given)
    assert isinstance(scored, NoisyScored)
    return scored


def node_logits(t: dict[str, Tensor], x_D: Tensor, chain: list[int], draws_S: Tensor) -> Tensor:
    """The noisy logits of the children of a node in the tree of 4 and then 3, by the equations."""
    layer = 1 - len(chain)
    keys = {n: t[f"keys_{n}"] / t[f"keys_{n}"].norm(dim=1, keepdim=True) for n in (0, 1)}
    known = torch.cat([t["down"] @ x_D + t["down_shift"], *(keys[1][e] for e in chain)])
    hidden = (t[f"in_{layer}"] @ known + t[f"in_shift_{layer}"]).clamp_min(0)
    q = t[f"out_{layer}"] @ hidden + t[f"out_shift_{layer}"]
    clean = keys[layer] @ (q / q.norm())
    return reference_options.noisy_logits(clean[None], (t[f"noise_{layer}"] @ known)[None], draws_S[None])[0]


def test_the_logits_equal_the_reference() -> None:
    """With the same draws: forward, and the gradient of the tokens and of every tensor, those of the noise too."""
    router = shaken()
    leaves = {"x": torch.randn(7, 12, requires_grad=True), **dict(router.named_parameters())}

    def naive() -> Tensor:
        torch.manual_seed(4)
        root, below = torch.randn(7, 1, 4), torch.randn(7, 4, 3)
        rows = []
        for x_D, root_CS, below_CS in zip(leaves["x"], root, below, strict=True):
            parts = [node_logits(leaves, x_D, [], root_CS[0])]
            parts += [node_logits(leaves, x_D, [n], below_CS[n]) for n in range(4)]
            rows.append(torch.cat(parts))
        return torch.stack(rows)

    found = gradients_of(lambda: noisy(router, leaves["x"]).logits_TE, leaves)
    for name, tensor in gradients_of(naive, leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_chances_equal_the_reference(k: int) -> None:
    leaves = {"clean": torch.randn(9, 4, requires_grad=True), "spread": torch.rand(9, 4).add(0.3).requires_grad_()}
    noisy_TS = (leaves["clean"] + torch.randn(9, 4) * leaves["spread"]).detach()

    def naive() -> Tensor:
        rows = zip(leaves["clean"], noisy_TS, leaves["spread"], strict=True)
        return torch.stack([reference_options.chance_of_top(*row, k) for row in rows])

    found = gradients_of(lambda: chance_of_top(leaves["clean"], noisy_TS, leaves["spread"], k), leaves)
    for name, tensor in gradients_of(naive, leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_chance_is_how_often_an_expert_is_chosen_again() -> None:
    clean_S, spread_S = torch.tensor([0.3, 0.0, -0.4, 0.1]), torch.tensor([0.5, 0.7, 0.6, 0.2])
    noisy_S = torch.tensor([0.5, -0.2, 0.1, 0.0])
    found_S = chance_of_top(clean_S, noisy_S, spread_S, 2)
    for e in range(4):
        again = noisy_S.repeat(20000, 1)
        again[:, e] = clean_S[e] + torch.randn(20000) * spread_S[e]
        often = (again.topk(2).indices == e).any(-1).float().mean()
        assert abs(float(often - found_S[e])) < 0.02


def test_noise_is_off_in_eval_and_a_single_child_has_its_logit() -> None:
    router = shaken().eval()
    x_TD = torch.randn(9, 12)
    routing = router(x_TD, every_token(1, 9))
    assert not isinstance(routing, NoisyTreeRouting)
    assert torch.equal(routing.weights_TK, router(x_TD, every_token(1, 9)).weights_TK)
    weights_TCS, logits_TCS = (by_level(x, [3, 4])[0] for x in (routing.weights_TK, routing.logits_TE))
    chosen_TC = by_level(routing.weights_TK, [3, 4])[1][:, 0] > 0
    torch.testing.assert_close(weights_TCS.sum(-1), logits_TCS.amax(-1) * chosen_TC)
    assert torch.equal((by_level(routing.weights_TK, [3, 4])[1] > 0).sum(-1), torch.full((9, 1), 2))


def test_its_loss_is_that_of_importance_and_load() -> None:
    model = adapted("smore", noise=True).train()
    (choice,) = model.peft_config["default"].balance
    assert isinstance(choice, TreeCvSquaredBalance)
    with record_routing(model) as recorder:
        model(**tiny_batch())
    (loss,) = balance_losses(recorder.records, [choice])
    terms = []
    for record in recorder.records:
        routing = record.routing
        assert isinstance(routing, NoisyTreeRouting)
        of_levels = []
        for size, (a, b) in ((4, (0, 4)), (3, (4, 16))):
            importance, load = (
                each[record.valid_T][:, a:b].unflatten(1, (-1, size)).sum((0, 1))
                for each in (routing.weights_TK, routing.chance_TE)
            )
            of_levels.append(cv_squared(importance) + cv_squared(load))
        terms.append(torch.stack(of_levels).mean())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)
    router = tuner_layers(model)["model.layers.0.mlp.up_proj"].moelora_router["default"]
    names, parameters = zip(*router.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    for name, grad, wanted in zip(names, found, torch.autograd.grad(expected, parameters), strict=True):
        assert_close(name, grad, wanted, rtol=1e-3, atol=1e-6)
        assert wanted.any(), name


def test_without_noise_it_draws_nothing_and_owns_no_such_tensor() -> None:
    model = adapted("smore").train()
    found = [gradients(model, tiny_batch()) for _ in range(2)]
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())
    assert not any("noise" in name for name in found[0])


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"fan_out is \[4, 4\]; allowed: for each layer fewer than its number of exp"):
        MoeLoraConfig.from_preset("smore", noise=True, fan_out=None)
    with pytest.raises(ConfigError, match="'tree_cv_squared' takes the load that is expected of the noise"):
        MoeLoraConfig.from_preset("smore", balance={"kind": "tree_cv_squared", "coef": 0.1})
    with pytest.raises(ConfigError, match="selection is .*'tree_top' of the sizes"):
        MoeLoraConfig.from_preset("mixlora", balance={"kind": "tree_cv_squared", "coef": 0.1})
    with pytest.raises(ConfigError, match="noise is 1; allowed: True, False"):
        TreeScores(noise=1)  # type: ignore[arg-type]
