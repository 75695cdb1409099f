"""One trained LoRA as the experts of a mixture that starts with its function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from moelora import record_routing
from moelora.compose import drop_experts, split_lora
from moelora.errors import ComposeError
from tests.adapters import outputs
from tests.compose.mixtures import loaded, saved, texts, train
from tests.conftest import tiny_model


def trained_lora(folder: Path, **words: Any) -> Path:
    """A PEFT LoRA whose B is not 0."""
    config = {"r": 8, "lora_alpha": 20, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    model = get_peft_model(tiny_model(), LoraConfig(**{**config, **words}))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.2
    model.save_pretrained(folder)
    return folder


def lora_outputs(folder: Path) -> Tensor:
    return outputs(PeftModel.from_pretrained(tiny_model(), str(folder)).eval())


SPLITS = [
    pytest.param({"into": "blocks", "num_experts": 4}, 4, 2, id="blocks"),
    pytest.param({"into": "blocks", "num_experts": 1}, 1, 8, id="one block"),
    pytest.param({"into": "rank_one"}, 8, 1, id="rank one"),
    pytest.param({"into": "copies", "num_experts": 3}, 3, 8, id="copies"),
    pytest.param({"into": "copies", "num_experts": 5, "top_k": 3}, 5, 8, id="copies of five"),
]


@pytest.mark.parametrize(("words", "num_experts", "rank"), SPLITS)
@pytest.mark.parametrize("source", [{}, {"use_rslora": True, "layers_to_transform": [1]}, "moelora"])
def test_the_start_is_the_lora(tmp_path: Path, words: dict[str, Any], num_experts: int, rank: int, source: Any) -> None:
    if source == "moelora":
        old = saved(tmp_path / "old", "lora", r=8)
        expected = outputs(loaded(old))
    else:
        old = trained_lora(tmp_path / "old", **source)
        expected = lora_outputs(old)
    assert not torch.allclose(expected, outputs(tiny_model()), atol=1e-2)
    split = split_lora(old, tmp_path / "new", **words)
    model = loaded(tmp_path / "new", is_trainable=True)
    model.eval()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-4, atol=2e-5)
    config = model.peft_config["default"]
    assert (config.experts.num_experts, config.experts.r) == (num_experts, rank)
    assert split.after.num_experts == num_experts
    assert split.after.num_parameters > split.before.num_parameters  # a router came with it
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, texts())
    assert all(not p.equal(before[name]) for name, p in model.named_parameters() if p.requires_grad) or num_experts == 1


def test_the_tokenizer_and_the_license_go_with_the_experts(tmp_path: Path) -> None:
    old = trained_lora(tmp_path / "old")
    (old / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A LoRA\n")
    (old / "training.json").write_text("{}")
    kept = {"chat_template.jinja": "{{ messages }}", "tokenizer.json": "{}"}
    for name, content in kept.items():
        (old / name).write_text(content)
    split = split_lora(old, tmp_path / "new", num_experts=4)
    assert "states the license 'apache-2.0'" in " ".join(split.notes)
    dropped = drop_experts(tmp_path / "new", tmp_path / "less", [0])
    assert not dropped.notes
    for folder in (split.folder, dropped.folder):
        assert {name: (folder / name).read_text() for name in kept} == kept
        assert {path.name for path in folder.iterdir()} - kept.keys() == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_copies_part_since_their_tokens_differ(tmp_path: Path) -> None:
    split_lora(trained_lora(tmp_path / "old"), tmp_path / "new", into="copies", num_experts=4)
    with record_routing(model := loaded(tmp_path / "new")) as listener:
        outputs(model)
    for record in listener.records:
        assert (record.counts_E() > 0).sum() >= 2


@pytest.mark.parametrize(
    ("lora", "words", "message"),
    [
        pytest.param({}, {"num_experts": 3}, r"one of \[1, 2, 4, 8\], the divisors", id="no divisor"),
        pytest.param({}, {}, "num_experts is None", id="no number"),
        pytest.param({}, {"into": "rank_one", "num_experts": 4}, "allowed: 8, the LoRA's rank", id="not the rank"),
        pytest.param({}, {"num_experts": 4, "top_k": 2}, "leave out parts of the function", id="top-k of blocks"),
        pytest.param({}, {"into": "copies", "num_experts": 4, "top_k": 1}, "no gradient", id="top-1 of copies"),
        pytest.param({}, {"into": "halves", "num_experts": 2}, "into is 'halves'", id="unknown way"),
        pytest.param({"rank_pattern": {"q_proj": 4}}, {"num_experts": 2}, r"ranks \[4, 8\]", id="two ranks"),
        pytest.param({"use_dora": True}, {"num_experts": 2}, "DoRA", id="DoRA"),
    ],
)
def test_what_cannot_be_split_leaves_nothing(
    tmp_path: Path, lora: dict[str, Any], words: dict[str, Any], message: str
) -> None:
    old = trained_lora(tmp_path / "old", **lora)
    with pytest.raises(ComposeError, match=message):
        split_lora(old, tmp_path / "new", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_mixture_is_not_split(tmp_path: Path) -> None:
    with pytest.raises(ComposeError, match="mixtures of 4 experts already"):
        split_lora(saved(tmp_path / "old", "molora"), tmp_path / "new", num_experts=2)
    with pytest.raises(ComposeError, match="holds no adapter"):
        split_lora(tmp_path / "none", tmp_path / "new", num_experts=2)
