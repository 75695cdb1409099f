from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from eval.conflict.measure import GRADIENT_BATCHES, conflict, layer_of, told_apart
from eval.scoring.losses import BATCH, row_losses
from moelora.errors import RunError
from tests.conftest import VOCAB, tiny_model


def example(seed: int, length: int, prompt: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}


def some(count: int, first: int = 0) -> list[dict[str, list[int]]]:
    return [example(first + i, 6 + i % 5, 3 + i % 2) for i in range(count)]


def with_lora() -> Any:
    """A model whose LoRA is not at its start, where half of the gradients vanish."""
    model = get_peft_model(tiny_model(), LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    return model.eval()


def loss_of(model: Any, row: dict[str, list[int]]) -> torch.Tensor:
    """Token by token, a row at a time, without padding."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    terms = [
        -logits[position - 1].log_softmax(-1)[label]
        for position, label in enumerate(row["labels"])
        if label != -100 and position > 0
    ]
    return torch.stack(terms).mean()


def test_the_loss_of_each_row_is_that_of_its_own_tokens() -> None:
    model, rows = with_lora(), some(2 * BATCH + 3)
    assert row_losses(model, rows) == pytest.approx([loss_of(model, row).item() for row in rows], abs=1e-5)


def test_a_row_without_an_answer_is_refused() -> None:
    with pytest.raises(RunError, match="no token of an answer"):
        row_losses(with_lora(), [*some(2), {"input_ids": [5, 6], "labels": [-100, -100]}])


def test_cosines_are_those_of_gradients_taken_by_hand() -> None:
    model = with_lora()
    rows = {"a": some(11), "b": some(GRADIENT_BATCHES * BATCH + 5, first=100)}
    used = {task: own[: GRADIENT_BATCHES * BATCH] for task, own in rows.items()}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def gradient(own: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        loss = torch.stack([loss_of(model, row) for row in own]).mean()
        return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))

    def by_hand(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], part: str) -> float:
        names = [name for name in trained if part in name]
        dot, aa, bb = (
            sum(float((x[name].double() * y[name].double()).sum()) for name in names)
            for x, y in ((a, b), (a, a), (b, b))
        )
        return dot / (aa * bb) ** 0.5

    found = conflict(model, rows)
    whole = {task: gradient(own) for task, own in used.items()}
    between = by_hand(whole["a"], whole["b"], "")
    assert found["overall"]["a"]["b"] == pytest.approx(between, abs=1e-4)
    assert found["overall"]["b"]["a"] == found["overall"]["a"]["b"]
    for task, own in used.items():
        halves = gradient(own[: len(own) // 2]), gradient(own[len(own) // 2 :])
        assert found["overall"][task][task] == pytest.approx(by_hand(*halves, ""), abs=1e-4)
    assert set(found["layers"]) == {"0", "1"}
    for layer, cosine in found["layers"].items():
        assert cosine == pytest.approx(by_hand(whole["a"], whole["b"], f".layers.{layer}."), abs=1e-4)
    assert layer_of("base_model.model.lm_head.lora_A.default.weight") == "outside"


def test_a_task_agrees_with_itself_under_another_name() -> None:
    model, rows = with_lora(), some(6)
    found = conflict(model, {"a": rows, "b": rows})
    assert found["overall"]["a"]["b"] == pytest.approx(1.0, abs=1e-6)


def test_prompts_are_told_apart_as_the_nearest_centroid_does() -> None:
    base = tiny_model()

    def of(tokens: range, count: int, first: int) -> list[dict[str, list[int]]]:
        rows = some(count, first)
        return [{**row, "input_ids": [tokens[i % len(tokens)] for i in row["input_ids"]]} for row in rows]

    low, high = range(5, 6), range(80, 81)  # of one token each, told apart even by a random model
    fitted = {"low": of(low, 6, 0), "high": of(high, 6, 50)}
    assert told_apart(base, fitted, {"low": of(low, 5, 100), "high": of(high, 5, 200)}) == {"low": 1.0, "high": 1.0}
    swapped = told_apart(base, fitted, {"low": of(high, 5, 100), "high": of(low, 4, 200) + of(high, 4, 300)})
    assert swapped == {"low": 0.0, "high": 0.5}
