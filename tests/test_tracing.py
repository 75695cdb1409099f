"""`torch.jit.trace` of an adapted model: the trace routes other batches as the model does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.adapters import PRESETS, adapted
from tests.conftest import tiny_batch

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:`torch.jit.* is deprecated:DeprecationWarning"
)


class Logits(nn.Module):
    """Tensors in, one tensor out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def inputs(**words: Any) -> tuple[Tensor, Tensor]:
    batch = tiny_batch(**words)
    return batch["input_ids"], batch["attention_mask"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("preset", PRESETS)
def test_trace(preset: str, name: str) -> None:
    model = Logits(adapted(preset, name)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(model, inputs(), check_trace=False)
        for batch in (inputs(), inputs(seed=4), inputs(batch_size=5, length=30, seed=5)):
            torch.testing.assert_close(traced(*batch), model(*batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", ["mixlora", "random_router"])
def test_the_model_is_as_before(preset: str) -> None:
    model = Logits(adapted(preset)).eval()
    with torch.no_grad():
        expected = model(*inputs())
        torch.jit.trace(model, inputs(), check_trace=False)
        assert torch.equal(model(*inputs()), expected)
