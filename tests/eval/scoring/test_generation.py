from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from eval.scoring.generation import answer, shared_tokens
from moelora import MoeLoraConfig, record_routing
from tests.conftest import tiny_model
from tests.runs.tiny import tiny_tokenizer

TEXTS = ["a", "some words", "more of them, and longer", "x y", "the fifth"]


@pytest.fixture
def model() -> Any:
    base = tiny_model("llama", vocab_size=len(tiny_tokenizer()), max_position_embeddings=128, pad_token_id=0)
    config = MoeLoraConfig.from_preset("mixlora", r=2, num_experts=3, task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "moelora_" in name:
                parameter.normal_(std=0.5)
    return peft_model.eval()


def prompts(before: str = "", after: str = "") -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(before + text + after)["input_ids"] for text in TEXTS]


def test_answers_do_not_depend_on_the_batch(model: Any) -> None:
    tokenizer = tiny_tokenizer()
    alone = []
    for prompt in prompts():
        output = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=1
        )
        alone.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True).strip())
    for batch_size in (1, 2, 5):
        answers, routing = answer(model, tokenizer, prompts(), batch_size=batch_size, max_new_tokens=6)
        assert answers == alone
        assert routing == []


def test_the_head_gets_contiguous_rows(model: Any) -> None:
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda head, inputs, output: seen.append(inputs[0]))
    answer(model, tiny_tokenizer(), prompts(), batch_size=5, max_new_tokens=2)
    assert seen[0].shape[:2] == (5, 1)
    assert all(rows.is_contiguous() for rows in seen)
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_routing_counts_the_questions_alone(model: Any) -> None:
    given = prompts("<|user|>", "<|end|><|assistant|>")
    shared = shared_tokens(given)
    assert shared == (1, 2)
    _, halves = answer(model, tiny_tokenizer(), given, batch_size=2, max_new_tokens=4, shared=shared)
    assert [half.tokens for half in halves] == [sum(map(len, TEXTS[half::2])) for half in (0, 1)]
    layer = "model.layers.1.mlp"
    for half in (0, 1):
        expected = torch.zeros(3)
        for prompt in given[half::2]:
            with torch.no_grad(), record_routing(model) as routing:
                model(input_ids=torch.tensor([prompt]))
            (record,) = [record for record in routing.records if record.layer == layer]
            expected += record.routing.load_TE()[1:-2].sum(0)
        assert halves[half].counts[layer].equal(expected)
        assert halves[half].loads()[layer].sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "shared"),
    [([[1, 2, 9, 4], [1, 2, 4]], (2, 1)), ([[1, 2], [1, 2]], (0, 0)), ([[5], [6]], (0, 0)), ([[1, 1], [1]], (0, 0))],
)
def test_shared_tokens(given: list[list[int]], shared: tuple[int, int]) -> None:
    assert shared_tokens(given) == shared
