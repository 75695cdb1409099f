"""SparseMixer: transformers' own function with the same draws, the reference, and its refusals.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.ops import reference_options
from moelora.routing.decision import Routing
from moelora.selection.sparse_mixer import SparseMixer
from tests.ops.compare import assert_close, gradients
from tests.routing.golden import LOGITS_TE, router_of
from tests.routing.routers import every_token


def drawn(logits_TE: Tensor, *, jitter: float = 0.9, training: bool = True, seed: int = 3) -> Routing:
    router = router_of(SparseMixer(jitter=jitter), num_experts=logits_TE.shape[1]).train(training)
    torch.manual_seed(seed)
    found: Routing = router(logits_TE, every_token(1, len(logits_TE)))
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("jitter", [0.01, 0.1, 0.6])
def test_equals_that_of_transformers(jitter: float, training: bool) -> None:
    """Phi-MoE's first choice: weights, choices and gradients, with the same draws."""
    leaves = {"logits": torch.randn(200, 6).requires_grad_()}

    def theirs() -> Tensor:
        torch.manual_seed(3)
        return sparsemixer(leaves["logits"], jitter_eps=jitter, training=training)[0][:, :1]

    torch.manual_seed(3)
    ids_TK = sparsemixer(leaves["logits"], jitter_eps=jitter, training=training)[1]
    routing = drawn(leaves["logits"], jitter=jitter, training=training)
    assert torch.equal(routing.ids_TK if routing.ids_TK is not None else ids_TK, ids_TK[:, :1])
    found = gradients(lambda: drawn(leaves["logits"], jitter=jitter, training=training).weights_TK, leaves)
    for name, tensor in gradients(theirs, leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-3, atol=1e-4)  # their third is 0.3333


@pytest.mark.parametrize("jitter", [0.05, 0.5, 0.9])
def test_equals_the_reference(jitter: float) -> None:
    leaves = {"logits": torch.randn(63, 5).requires_grad_()}
    routing = drawn(leaves["logits"], jitter=jitter)
    assert routing.ids_TK is not None
    ids_T = routing.ids_TK[:, 0]
    whole_T = reference_options.sparse_mixer(leaves["logits"], ids_T, torch.ones(63), jitter)
    is_whole_T = (routing.weights_TK[:, 0] - whole_T).abs() < 1e-6
    is_best_T = ids_T == leaves["logits"].argmax(-1)
    assert is_whole_T[is_best_T].all()
    found = gradients(lambda: drawn(leaves["logits"], jitter=jitter).weights_TK[:, 0], leaves)
    expected = gradients(lambda: reference_options.sparse_mixer(leaves["logits"], ids_T, is_whole_T, jitter), leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_draws_follow_the_probabilities_and_a_quarter_of_the_rest_is_whole() -> None:
    draws = 20000
    logits_TE = LOGITS_TE[:1].repeat(draws, 1) / 2 + 3  # all near the highest
    routing = drawn(logits_TE)
    assert routing.ids_TK is not None
    probs_E = logits_TE[0].softmax(-1)
    counts_E = torch.bincount(routing.ids_TK[:, 0], minlength=4) / draws
    torch.testing.assert_close(counts_E, probs_E, rtol=0, atol=0.015)
    rest_T = routing.ids_TK[:, 0] == 1
    is_whole_T = (routing.weights_TK[rest_T, 0] - probs_E[1]).abs() < 1e-5
    assert abs(float(is_whole_T.float().mean()) - 0.25) < 0.03
    assert (routing.weights_TK[rest_T, 0][~is_whole_T] - probs_E[1] / 3).abs().max() < 1e-5


def test_outside_training_the_likeliest_is_taken() -> None:
    """Its weight is the softmax over what is near it: of 2 with a jitter of a quarter, that is 1 too."""
    routing = drawn(LOGITS_TE[:1], jitter=0.24, training=False)
    assert routing.ids_TK is not None
    assert routing.ids_TK.tolist() == [[0]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1.0]]))  # (2 - 1) / 2 is above twice that
    routing = drawn(LOGITS_TE[:1], jitter=0.25, training=False)
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.731059]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("preset", "words", "message"),
    [
        ("sira", {"selection": {"kind": "sparse_mixer", "jitter": 1.0}}, r"selection\.jitter is 1\.0; allowed: 0 <="),
        ("mixlora", {"selection": "sparse_mixer"}, "placement is 'feed_forward'; allowed: a placement on linears"),
        ("smora", {"selection": "sparse_mixer", "balance": []}, "'sparse_mixer' draws by probabilities"),
    ],
)
def test_bad_combinations(preset: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig.from_preset(preset, **words)
