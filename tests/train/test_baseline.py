from __future__ import annotations

from pathlib import Path

import pytest
from peft import get_peft_model

from moelora.errors import RunError
from moelora.runs.config import BaselineConfig, adapter_config, load_config
from moelora.runs.models import load_model
from moelora.runs.parameters import TOLERANCE
from tests.runs.tiny import write_run
from train.baseline import baseline_config


def test_a_matching_rank_has_as_many_trainable_parameters(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path), ["adapter.r=24", "adapter.lora_alpha=36", "adapter.lora_dropout=0.1"])
    adapter = adapter_config(config)
    lora = baseline_config(config, BaselineConfig(), adapter)
    counts = [get_peft_model(load_model(config), c).get_nb_trainable_parameters()[0] for c in (lora, adapter)]
    assert abs(counts[0] / counts[1] - 1) < TOLERANCE
    assert lora.lora_alpha / lora.r == 1.5
    assert lora.lora_dropout == 0.1


def test_no_rank_comes_near(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    with pytest.raises(RunError, match=r"the nearest rank, 4, is -6.0% off, allowed: 2%. Set baseline.r to a number"):
        baseline_config(config, BaselineConfig(), adapter_config(config))


def test_what_the_run_says_is_taken(tmp_path: Path) -> None:
    config = load_config(write_run(tmp_path))
    words = BaselineConfig(r=3, lora_alpha=7, lora_dropout=0.2, target_modules=["q_proj"])
    lora = baseline_config(config, words, adapter_config(config))
    assert (lora.r, lora.lora_alpha, lora.lora_dropout, lora.target_modules) == (3, 7, 0.2, {"q_proj"})
