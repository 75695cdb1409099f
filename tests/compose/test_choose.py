"""Choosing from a pool: a good LoRA, a near copy of it, another good one, a bad one, each planted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from moelora.compose import choose, from_loras
from moelora.errors import ComposeError, ConfigError
from moelora_cli import main as moelora
from tests.adapters import outputs, snapshot
from tests.compose.loras import save_lora, unlike_loras
from tests.conftest import tiny_model
from tests.runs.tiny import tiny_folder

WEIGHTS = "adapter_model.safetensors"


def rows(count: int = 6) -> list[dict[str, list[int]]]:
    """Prompts of several tokens, and always the same answer."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, 90, (count, 5 + 2), generator=generator).tolist()
    return [
        {"input_ids": [*p[: 5 + i % 3], 3, 4], "labels": [-100] * len(p[: 5 + i % 3]) + [3, 4]}
        for i, p in enumerate(prompts)
    ]


def _train(folder: Path, targets: list[str], seed: int) -> Path:
    """A LoRA that has learnt the answer a little."""
    torch.manual_seed(seed)
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    for _ in range(8):
        for row in rows():
            model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("pool")
    good = _train(folder / "good", ["down_proj", "up_proj"], 0)
    shutil.copytree(good, folder / "copy")
    tensors = load_file(folder / "copy" / WEIGHTS)
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        # a little worse than the original, and turned: other factors of almost the same product
        turned = tensor.flip(0) if "lora_A" in name else tensor.flip(1)
        tensors[name] = (0.97 * turned + 0.002 * torch.randn(tensor.shape, generator=generator)).contiguous()
    save_file(tensors, folder / "copy" / WEIGHTS, metadata={"format": "pt"})
    _train(folder / "other", ["o_proj", "v_proj"], 2)
    save_lora(folder / "bad", 3)
    return {name: str(folder / name) for name in ("bad", "copy", "other", "good")}


def _loss(model: Any) -> float:
    """Row by row, without padding."""
    losses = []
    for row in rows():
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        losses.append(F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none"))
    return float(torch.cat(losses).mean())


def _product(folder: str) -> Tensor:
    """All of a LoRA's changes of weights, as one vector."""
    model = PeftModel.from_pretrained(tiny_model(), folder)
    merged, base = model.merge_and_unload().state_dict(), tiny_model().state_dict()
    return torch.cat([(merged[name] - base[name]).flatten() for name in base])


def test_near_copies_are_not_chosen_twice(pool: dict[str, str]) -> None:
    base = tiny_model()
    before = snapshot(base)
    found = choose(base, pool, rows(), 3, batch_size=4)
    assert found.names[:2] == ["good", "other"]
    assert choose(base, pool, rows(), 2, diversity=0.0).names == ["good", "copy"]
    assert choose(base, pool, rows(), 9).names == choose(base, pool, rows(), 4).names
    assert snapshot(base) == before
    for name, folder in pool.items():
        expected = _loss(PeftModel.from_pretrained(tiny_model(), folder).eval())
        assert found.losses[name] == pytest.approx(expected, rel=1e-4)
    cosine = F.cosine_similarity(_product(pool["good"]), _product(pool["other"]), dim=0)
    assert found.nearest["other"] == pytest.approx(float(cosine), abs=1e-4)
    of_copy = choose(base, pool, rows(), 2, diversity=0.0).nearest["copy"]
    expected = float(F.cosine_similarity(_product(pool["good"]), _product(pool["copy"]), dim=0))
    assert of_copy == pytest.approx(expected, abs=1e-4)
    assert of_copy > 0.9


def test_the_formula(tmp_path: Path) -> None:
    """Against a greedy choice on full products, of LoRAs with other ranks, scalings and sites."""
    pool = {**unlike_loras(tmp_path), "d": str(save_lora(tmp_path / "d", 0, r=2, target_modules=["q_proj", "v_proj"]))}
    losses = {name: _loss(PeftModel.from_pretrained(tiny_model(), folder).eval()) for name, folder in pool.items()}
    products = {name: _product(folder) for name, folder in pool.items()}
    span = max(losses.values()) - min(losses.values())
    for diversity in (0.2, 0.8):
        names: list[str] = []
        while len(names) < 4:
            worth = {}
            for name in set(pool) - set(names):
                quality = (max(losses.values()) - losses[name]) / span
                near = [float(F.cosine_similarity(products[name], products[c], dim=0)) for c in names]
                worth[name] = (1 - diversity) * quality + diversity * (1 - max(near)) if near else quality
            names.append(max(worth, key=lambda name: worth[name]))
        assert choose(tiny_model(), pool, rows(), 4, diversity=diversity).names == names


def test_kshot_composes_the_chosen(pool: dict[str, str]) -> None:
    """The recipe: the same choice, and a router that a few steps on the rows make better."""
    model = from_loras(tiny_model(), pool, {"kind": "kshot", "count": 2}, examples={"": rows()})
    assert model.peft_config["default"].experts.names == ["good", "other"]
    before = _loss(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(5):
        for row in rows():
            model(**{name: torch.tensor([ids]) for name, ids in row.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert _loss(model) < before


def test_kshot_by_the_command(pool: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of the rows is the new one, no name of a LoRA."""
    tiny_folder(tmp_path / "base")
    rows = [{"prompt": f"{n} ", "completion": f"{n + 1}", "task": "new"} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    words = [f"{name}={folder}" for name, folder in pool.items()]
    router = ["--router", "{kind: kshot, count: 2}", "--data", "rows.jsonl", "--base", "base", "-o", "mix"]
    assert moelora(["compose", *words, *router, "--any-base-name"]) == 0
    config = json.loads((tmp_path / "mix/adapter_config.json").read_text())
    assert len(config["experts"]["names"]) == 2
    assert [source["source"] for source in config["experts"]["sources"]] == [
        Path(pool[name]).name for name in config["experts"]["names"]
    ]


def test_what_cannot_be_chosen(pool: dict[str, str], tmp_path: Path) -> None:
    base = tiny_model(intermediate_size=60)
    before = snapshot(base)
    with pytest.raises(ComposeError, match="made for"):
        choose(base, pool, rows(), 2)
    with pytest.raises(ComposeError, match="by rows with answers, and there are none"):
        choose(base, pool, [], 2)
    with pytest.raises(ComposeError, match="by rows with answers, and one has none"):
        choose(base, pool, [{"input_ids": [4, 5]}], 2)
    with pytest.raises(ComposeError, match="count=0"):
        choose(base, pool, rows(), 0)
    with pytest.raises(ConfigError, match="router.diversity is 2; allowed: a number of 0 to 1"):
        from_loras(base, pool, {"kind": "kshot", "diversity": 2}, examples={"": rows()})
    with pytest.raises(ComposeError, match="'kshot' works on rows with answers, and there are none"):
        from_loras(base, pool, "kshot")
    assert snapshot(base) == before
    torch.testing.assert_close(outputs(base), outputs(tiny_model(intermediate_size=60)))
