from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from tests.conftest import tiny_model
from tests.runs.tiny import tiny_tokenizer
from train.completion_loss import CompletionLossTrainer

ROWS = Dataset.from_list(
    [{"prompt": "ab" * n, "completion": "c" * (1 + n % 3)} for n in range(1, 9)],
)


def trainer(kind: type[SFTTrainer], folder: Path, **words: Any) -> Any:
    tokenizer = tiny_tokenizer()
    base = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    torch.manual_seed(1)
    model = get_peft_model(base, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 0.02,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        **words,
    }
    args = SFTConfig(output_dir=str(folder), **settings)
    return kind(model=model, args=args, train_dataset=ROWS, processing_class=tokenizer)


@pytest.mark.parametrize("words", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}])
def test_training_is_that_of_trl(tmp_path: Path, words: dict[str, Any]) -> None:
    ours, theirs = (trainer(kind, tmp_path, **words) for kind in (CompletionLossTrainer, SFTTrainer))
    for each in (ours, theirs):
        each.train()
    losses = [[log["loss"] for log in each.state.log_history if "loss" in log] for each in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    accuracy = [log["token_accuracy"] for log in ours.state.log_history if "loss" in log]
    if not words:  # TRL averages the micro-batches, whatever number of labels each has
        assert accuracy == pytest.approx(
            [log["mean_token_accuracy"] for log in theirs.state.log_history if "loss" in log], abs=1e-5
        )
    pairs = zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a, b, msg=name, atol=1e-5, rtol=1e-4)


def test_only_labelled_positions_reach_the_head(tmp_path: Path) -> None:
    each = trainer(CompletionLossTrainer, tmp_path)
    widths = []
    head = each.model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    batch = next(iter(each.get_train_dataloader()))
    labelled = int((batch["labels"][:, 1:] != -100).any(0).sum())
    each.model.train()
    each.compute_loss(each.model, dict(batch), num_items_in_batch=5)
    assert widths == [labelled]
    assert labelled < batch["labels"].shape[1] - 1


def test_evaluation_and_other_losses_are_left_to_trl(tmp_path: Path) -> None:
    plain = trainer(CompletionLossTrainer, tmp_path)
    batch = dict(next(iter(plain.get_train_dataloader())))
    assert plain._is_plain(batch)
    assert not plain._is_plain({key: value for key, value in batch.items() if key != "labels"})
    for name, value in (("loss_type", "dft"), ("label_smoothing_factor", 0.1)):
        default = getattr(plain.args, name)
        setattr(plain.args, name, value)
        assert not plain._is_plain(batch)
        setattr(plain.args, name, default)
    plain.model.eval()
    plain.compute_loss(plain.model, batch)
    assert plain._correct is None
