"""What a run is said to need is what a tiny model is then seen to need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from moelora.errors import RunError
from moelora.runs.config import DatasetConfig, RunConfig, adapter_config
from moelora.runs.estimate import estimate

SEQUENCES, LENGTH = 2, 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=500,
    ).save_pretrained(folder)
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    return folder


def run(base: Path, preset: str = "mixlora", **training: Any) -> RunConfig:
    return RunConfig(
        model=str(base),
        output_dir="runs/x",
        dataset=DatasetConfig(files="rows.jsonl"),
        adapter={"preset": preset},
        dtype="float32",
        training={"per_device_train_batch_size": SEQUENCES, "gradient_checkpointing": False, **training},
    )


def seen(base: Path, config: RunConfig) -> tuple[int, int, int]:
    """Operations of a step, bytes kept for its backward pass, trainable parameters: of a real model."""
    model = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(base)), adapter_config(config))
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return (
        counter.get_total_flops(),
        sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        model.get_nb_trainable_parameters()[0],
    )


@pytest.mark.filterwarnings("ignore:The adapter is configured with a balance loss")
@pytest.mark.parametrize("preset", ["lora", "mixlora", "sira"])
def test_an_estimate_is_near_what_is_seen(base: Path, preset: str) -> None:
    config = run(base, preset)
    found = estimate(config, LENGTH)
    flops, kept, trainable = seen(base, config)
    assert found.parameters.trainable == trainable
    assert found.flops == pytest.approx(flops, rel=0.15)
    assert found.memory["activations"] == pytest.approx(kept, rel=0.2)


def test_what_settings_change(base: Path) -> None:
    plain = estimate(run(base), LENGTH)
    assert plain.memory["gradients"] == 4 * plain.parameters.trainable
    assert plain.memory["optimizer"] == 8 * plain.parameters.trainable
    assert plain.memory["base"] == 4 * plain.parameters.base
    changed = estimate(
        run(base, gradient_checkpointing=True, gradient_accumulation_steps=3, optim="adamw_bnb_8bit"), LENGTH
    )
    assert changed.memory["optimizer"] == 2 * plain.parameters.trainable
    assert changed.memory["activations"] < 0.6 * plain.memory["activations"]
    # the forward pass, a little less than half of the base's part, is done twice
    assert 3 * 1.25 < changed.flops / plain.flops < 3 * 1.5
    quantised = run(base)
    quantised.model_kwargs = {"quantization_config": {"load_in_4bit": True}}
    embeddings = 2 * 500 * 128 + (2 * 3 + 1) * 128  # with the head and the norms
    linears = plain.parameters.base - embeddings
    assert estimate(quantised, LENGTH).memory["base"] == 4 * embeddings + linears * 4.5 / 8


def test_a_length_that_is_none_is_refused(base: Path) -> None:
    with pytest.raises(RunError, match="length of a sequence is 0; allowed: at least 1"):
        estimate(run(base), 0)


@pytest.mark.parametrize("dtype", get_args(get_type_hints(RunConfig)["adapter_dtype"]))
def test_every_data_type_of_the_adapter_has_a_size(base: Path, dtype: str) -> None:
    config = replace(run(base), dtype="bfloat16", adapter_dtype=dtype)  # type: ignore[arg-type]
    found = estimate(config)
    assert found.memory["adapter"] == found.parameters.trainable * {"auto": 4, "float32": 4}.get(dtype, 2)
