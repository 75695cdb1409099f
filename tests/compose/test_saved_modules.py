"""LoRAs that trained whole modules too, and what is made of them: reward models on one base as one (after DMoERM)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, LlamaForSequenceClassification
from trl import RewardConfig, RewardTrainer

from moelora import MoeLoraTrainerMixin
from moelora.compose import from_loras, split_lora
from moelora.errors import ComposeError
from moelora_cli import main
from tests.adapters import outputs, snapshot
from tests.compose.mixtures import weights
from tests.conftest import tiny_model
from tests.runs.tiny import tiny_folder, tiny_tokenizer

IDS = torch.tensor([[7, 8, 9, 10], [20, 21, 22, 23], [11, 5, 6, 90]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a base model is."""
    return tiny_folder(tmp_path / "base")


def reward_base(folder: Path) -> Any:
    """The base as a reward model; the head that its file lacks starts at the same values each time."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, num_labels=1)
    return LlamaForSequenceClassification.from_pretrained(folder, config=config).eval()


def save_reward_lora(base: Path, folder: Path, seed: int, head: int = 0) -> str:
    """A LoRA of a reward model, whose head has the values of the seed `head`."""
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj"], task_type="SEQ_CLS")
    model = get_peft_model(reward_base(base), config)
    for name, tensor in model.named_parameters():
        if tensor.requires_grad:
            generator = torch.Generator().manual_seed(seed if "lora_" in name else head)
            tensor.data = torch.randn(tensor.shape, generator=generator) * 0.3
    model.save_pretrained(str(folder))
    assert "base_model.model.score.weight" in weights(folder)
    return str(folder)


@torch.no_grad()
def rewards(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_equal_heads_are_carried(folder: Path, tmp_path: Path) -> None:
    loras = {name: save_reward_lora(folder, tmp_path / name, n) for n, name in enumerate("ab")}
    alone = [rewards(PeftModel.from_pretrained(reward_base(folder), lora)) for lora in loras.values()]
    for name, expected in zip("ab", alone, strict=True):
        one = from_loras(reward_base(folder), {name: loras[name]})
        torch.testing.assert_close(rewards(one), expected, rtol=1e-5, atol=1e-5)
        one.save_pretrained(str(tmp_path / f"one-{name}"))
        again = PeftModel.from_pretrained(reward_base(folder), str(tmp_path / f"one-{name}"))
        assert torch.equal(rewards(again), rewards(one))
    assert not torch.allclose(alone[0], alone[1], atol=1e-3)
    both = from_loras(reward_base(folder), loras)
    assert both.peft_config["default"].task_type == "SEQ_CLS"
    assert rewards(both).shape == (3, 1)


def test_heads_that_differ_are_refused_or_new(folder: Path, tmp_path: Path) -> None:
    loras = {name: save_reward_lora(folder, tmp_path / name, n, head=n) for n, name in enumerate("ab")}
    base = reward_base(folder)
    before = snapshot(base)
    with pytest.raises(ComposeError, match=r"'a' and 'b' each saved 'score' whole.*modules_to_save=\['score'\]"):
        from_loras(base, loras)
    assert snapshot(base) == before
    head = base.score.weight.clone()
    model = from_loras(base, loras, modules_to_save=["score"])
    assert torch.equal(model.base_model.model.score.modules_to_save["default"].weight, head)


def test_a_head_of_another_size_is_refused(folder: Path, tmp_path: Path) -> None:
    lora = save_reward_lora(folder, tmp_path / "a", 0)
    config = AutoConfig.from_pretrained(folder, num_labels=2)
    base = LlamaForSequenceClassification(config).eval()
    before = snapshot(base)
    with pytest.raises(ComposeError, match=r"score.weight \[1, 36\], and the base model has \[2, 36\]"):
        from_loras(base, {"a": lora})
    assert snapshot(base) == before


def test_what_one_lora_saved_is_carried(tmp_path: Path) -> None:
    """By a composition and by a split; the function is the LoRA's."""
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    lora = get_peft_model(tiny_model(), config)
    for tensor in lora.parameters():
        if tensor.requires_grad:
            tensor.data = torch.randn(tensor.shape) * 0.2
    lora.save_pretrained(str(tmp_path / "a"))
    expected = outputs(lora.eval())
    composed = from_loras(tiny_model(), {"a": str(tmp_path / "a")})
    torch.testing.assert_close(outputs(composed), expected, rtol=1e-4, atol=1e-5)
    split_lora(tmp_path / "a", tmp_path / "split", num_experts=2)
    split = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "split")).eval()
    torch.testing.assert_close(outputs(split), expected, rtol=1e-4, atol=1e-5)
    other = LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_model(), other).save_pretrained(str(tmp_path / "b"))
    both = from_loras(tiny_model(), {name: str(tmp_path / name) for name in "ab"}, "task")
    found = both.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(found, weights(tmp_path / "a")["base_model.model.lm_head.weight"])


class Trainer(MoeLoraTrainerMixin, RewardTrainer):
    """What the header of configs/compose/dmoerm.yaml says."""


def test_a_reward_model_of_reward_models_is_trained(folder: Path, tmp_path: Path) -> None:
    """An MLP in the place of the head: it and the routers move, the experts stay, and saving keeps it all."""
    loras = {name: save_reward_lora(folder, tmp_path / name, n, head=n) for n, name in enumerate("abc")}

    def with_mlp() -> Any:
        base = reward_base(folder)
        torch.manual_seed(1)
        base.score = nn.Sequential(nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 1, bias=False))
        return base

    model = from_loras(with_mlp(), loras, {"kind": "topk", "top_k": 2}, modules_to_save=["score"])
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    rows = [{"prompt": f"{n}? ", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(8)]
    words = {"max_steps": 30, "per_device_train_batch_size": 8, "learning_rate": 0.01, "report_to": [], "use_cpu": True}
    args = RewardConfig(
        output_dir=str(tmp_path / "run"), logging_steps=1, gradient_checkpointing=False, bf16=False, **words
    )
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    moved = {name for name, tensor in model.named_parameters() if not torch.equal(tensor, before[name])}
    assert {name.partition(".modules_to_save")[0].rpartition(".")[2] for name in moved if "score" in name} == {"score"}
    assert len([name for name in moved if "score" in name]) == 3
    assert all("score" in name or "moelora_router" in name for name in moved)
    assert any("moelora_router" in name for name in moved)
    model.save_pretrained(str(tmp_path / "dmoerm"))
    again = PeftModel.from_pretrained(with_mlp(), str(tmp_path / "dmoerm"))
    torch.testing.assert_close(rewards(again), rewards(model), rtol=1e-6, atol=1e-6)


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The words of configs/compose/dmoerm.yaml."""
    loras = {name: save_reward_lora(folder, tmp_path / name, n, head=n) for n, name in enumerate("ab")}
    page = (Path(__file__).parents[2] / "configs/compose/dmoerm.yaml").read_text()
    words = {**yaml.safe_load(page), "model": str(folder), "loras": loras, "output_dir": str(tmp_path / "out")}
    (tmp_path / "dmoerm.yaml").write_text(yaml.safe_dump({**words, "dtype": "float32"}))
    assert main(["compose", "--config", str(tmp_path / "dmoerm.yaml")]) == 0
    assert "moelora inspect" in capsys.readouterr().out
    model = PeftModel.from_pretrained(reward_base(folder), str(tmp_path / "out"))
    assert rewards(model).shape == (3, 1)
    assert "base_model.model.score.weight" in weights(tmp_path / "out")
