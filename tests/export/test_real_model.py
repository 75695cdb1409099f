"""The export of a mixture of the quickstart's shape, with fewer experts, on the real SmolLM2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoTokenizer

from moelora.export import check_export, to_native_moe
from moelora.runs.config import adapter_config, load_config
from moelora.runs.models import load_model
from tests.export.bases import observed_without_moelora

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart-joint.yaml"


@pytest.mark.real_model
def test_the_quickstarts_adapter_on_smollm2(tmp_path: Path) -> None:
    config = load_config(QUICKSTART, ["adapter.num_experts=3"])
    base = load_model(config)
    model = get_peft_model(base, adapter_config(config))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "moelora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.01)
    model.save_pretrained(tmp_path / "adapter")
    source = model.peft_config["default"].base_model_name_or_path
    del model, base

    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe", dtype="float32", max_shard_size="500MB")
    assert moe.architecture == "MixtralForCausalLM"
    assert moe.parameters == 293_819_328
    assert len(moe.files) == 3
    found, flips = check_export(moe.folder, tmp_path / "adapter", source)
    assert found.logit_difference < 1e-5 * found.largest_logit
    assert found.largest_logit > 10
    assert found.same_greedy
    assert flips.router < 0.02
    assert flips.native < 0.1
    name, count, seen = observed_without_moelora(moe.folder)[moe.folder]
    assert (name, count) == (moe.architecture, moe.parameters)
    assert seen["logits"].isfinite().all()
    text = "Sort these words: pear, fig, 3.5 plums!\n\n"
    assert AutoTokenizer.from_pretrained(moe.folder)(text) == AutoTokenizer.from_pretrained(source)(text)
