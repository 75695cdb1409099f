"""A composition computes what its LoRAs do, whatever their shapes; what cannot be composed leaves the base alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, create_arrow_model, get_peft_model
from peft.tuners.lora.config import ArrowConfig
from safetensors.torch import load_file, save_file

from moelora.compose import from_loras
from moelora.errors import ComposeError, ConfigError
from tests.adapters import outputs, snapshot
from tests.compose.loras import save_lora, three_loras, unlike_loras
from tests.conftest import tiny_batch, tiny_model


def with_lora(folder: str, **words: Any) -> Any:
    """The tiny model with one of the LoRAs, by PEFT."""
    return PeftModel.from_pretrained(tiny_model(), folder, **words).eval()


@pytest.mark.parametrize("make", [three_loras, unlike_loras], ids=["alike", "unlike"])
def test_each_expert_is_its_lora(make: Any, tmp_path: Path) -> None:
    """Ranks, alphas, rsLoRA, patterns and missing sites: an expert chosen by task is the LoRA, -1 is the base."""
    loras = make(tmp_path)
    model = from_loras(tiny_model(), loras, "task")
    for number, folder in enumerate(loras.values()):
        expected = outputs(with_lora(folder))
        found = outputs(model.base_model, task_ids=torch.full((3,), number))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    base = outputs(model.base_model, task_ids=torch.full((3,), -1))
    torch.testing.assert_close(base, outputs(tiny_model()), rtol=0, atol=1e-6)


def test_each_sequence_has_its_own(tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    model = from_loras(tiny_model(), loras, "task")
    mixed = outputs(model.base_model, task_ids=torch.tensor([2, 0, -1]))
    folders = list(loras.values())
    for row, number in enumerate((2, 0, -1)):
        alone = tiny_model() if number < 0 else with_lora(folders[number])
        torch.testing.assert_close(mixed[row], outputs(alone)[row], rtol=1e-5, atol=1e-5)


def test_task_ids_out_of_range(tmp_path: Path) -> None:
    model = from_loras(tiny_model(), three_loras(tmp_path), "task")
    with pytest.raises(ConfigError, match=r"task_ids are \[0, 3, 0\]; allowed: 0 to 2"):
        outputs(model.base_model, task_ids=torch.tensor([0, 3, 0]))
    for wrong in ([0.7, 1.0, 2.0], [True, False, True], [[0], [1], [2]]):
        with pytest.raises(ConfigError, match="allowed: one whole number for each sequence"):
            outputs(model.base_model, task_ids=torch.tensor(wrong))
    with pytest.raises(ConfigError, match="routes by task_ids"):
        outputs(model)


def test_uniform_is_pefts_cat(tmp_path: Path) -> None:
    """`add_weighted_adapter(combination_type="cat")` with weights 1/E."""
    loras = three_loras(tmp_path)
    peft_model = with_lora(loras["sums"], adapter_name="sums")
    for name in ("words", "facts"):
        peft_model.load_adapter(loras[name], adapter_name=name)
    peft_model.add_weighted_adapter(list(loras), [1 / 3] * 3, "mix", combination_type="cat")
    peft_model.set_adapter("mix")
    found = outputs(from_loras(tiny_model(), loras, "uniform"))
    torch.testing.assert_close(found, outputs(peft_model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_arrow_is_pefts(top_k: int, tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    theirs = create_arrow_model(
        tiny_model(), list(loras.values()), ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=0)
    ).eval()
    _exact_prototypes(theirs)
    ours = from_loras(tiny_model(), loras, {"kind": "arrow", "top_k": top_k, "temperature": 0.7})
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_general_loras_are_subtracted_as_by_peft(count: int, tmp_path: Path) -> None:
    """GenKnowSub: A and B each for itself, whatever the general LoRAs' alpha."""
    loras = three_loras(tmp_path)
    general = [str(save_lora(tmp_path / f"general{i}", 10 + i, lora_alpha=2)) for i in range(count)]
    theirs = create_arrow_model(
        tiny_model(),
        list(loras.values()),
        ArrowConfig(top_k=2, router_temperature=0.7, rng_seed=0, use_gks=True),
        general_adapter_paths=general,
    ).eval()
    _exact_prototypes(theirs)
    router = {"kind": "arrow", "top_k": 2, "temperature": 0.7}
    ours = from_loras(tiny_model(), loras, {**router, "general": general})
    torch.testing.assert_close(outputs(ours), outputs(theirs), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs(ours), outputs(from_loras(tiny_model(), loras, router)), atol=1e-2)
    assert ours.peft_config["default"].experts.sources[1]["minus"] == [Path(each).name for each in general]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"r": 2}, r"\(3, 52, 36\) at 'model.layers.0.mlp.down_proj' where .*general' has \(2, 52, 36\)"),
        ({"target_modules": ["q_proj"]}, "where .*general' has nothing"),
    ],
)
def test_general_loras_of_another_shape(words: dict[str, Any], message: str, tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    general = str(save_lora(tmp_path / "general", 10, **words))
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ComposeError, match=message):
        from_loras(base, loras, {"kind": "arrow", "general": [general]})
    assert snapshot(base) == before
    with pytest.raises(ConfigError, match="router.general is 'x'; allowed: a list"):
        from_loras(base, loras, {"kind": "arrow", "general": "x"})


def _exact_prototypes(model: Any) -> None:
    """Let PEFT's power iteration converge; 15 steps leave it some percent off where two singular values are near."""
    outputs(model)
    for layer in model.modules():
        arrow = getattr(layer, "lora_arrow", {})
        for router in arrow.values() if hasattr(arrow, "values") else ():
            tasks = router.task_adapter_names
            found = [
                router.top_right_singular_vec_from_BA(layer.lora_A[n].weight, layer.lora_B[n].weight, iters=3000)
                for n in tasks
            ]
            router.prototypes.copy_(torch.stack(found))


def test_saved_and_loaded(tmp_path: Path) -> None:
    loras = unlike_loras(tmp_path)
    model = from_loras(tiny_model(), loras, "arrow")
    model.save_pretrained(str(tmp_path / "mix"))
    again = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "mix")).eval()
    assert torch.equal(outputs(again), outputs(model))
    experts = json.loads((tmp_path / "mix" / "adapter_config.json").read_text())["experts"]
    assert (experts["kind"], experts["names"], experts["ranks"]) == ("lora_composed", ["a", "b", "c"], [2, 5, 3])
    assert [source["source"] for source in experts["sources"]] == ["a", "b", "c"]


@pytest.mark.parametrize("trainable", [False, True])
def test_what_is_trained(trainable: bool, tmp_path: Path) -> None:
    """A router over frozen experts, or all of it; the padding of smaller ranks stays 0 under weight decay."""
    model = from_loras(tiny_model(), unlike_loras(tmp_path), "topk", trainable=trainable)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model.train()
    for _ in range(2):
        model(**tiny_batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split("moelora_")[1].split(".")[0] for name in moved} == (
        {"router", "A", "B"} if trainable else {"router"}
    )
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a_ERD = layer.parts["default"]["A"].tensor("weight")
    assert not a_ERD[0, 2:].any()
    assert a_ERD[0, :2].any()


def test_names(tmp_path: Path) -> None:
    """Of a list the last parts of the paths; two alike are refused."""
    loras = three_loras(tmp_path)
    model = from_loras(tiny_model(), list(loras.values()))
    assert model.peft_config["default"].experts.names == list(loras)
    with pytest.raises(ComposeError, match="several LoRAs are called sums"):
        from_loras(tiny_model(), [loras["sums"], loras["sums"] + "/"])
    with pytest.raises(ComposeError, match="no LoRAs to compose"):
        from_loras(tiny_model(), [])


def _edit(folder: Path, **fields: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def _cut(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _change(folder: Path, change: Any) -> None:
    file = str(folder / "adapter_model.safetensors")
    save_file(change(load_file(file)), file)


def _nan(tensors: dict[str, Any]) -> dict[str, Any]:
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    return tensors


def _half(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(list(tensors.items())[1:])


BROKEN: dict[str, tuple[Any, str]] = {
    "no folder": (shutil.rmtree, "cannot be read as an adapter"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "weights of the LoRA .* cannot be read"),
    "cut off": (_cut, "weights of the LoRA .* cannot be read"),
    "nan": (lambda f: _change(f, _nan), "holds NaN or infinity in base_model"),
    "half a pair": (lambda f: _change(f, _half), "allowed: A .r, in. and B .out, r."),
    "dora": (lambda f: _edit(f, use_dora=True), "use_dora=True, and DoRA also rescales"),
    "modules_to_save": (lambda f: _edit(f, modules_to_save=["lm_head"]), "modules_to_save=.*all experts would share"),
    "bias": (lambda f: _edit(f, bias="all"), "bias='all', and it changes biases"),
    "pissa": (lambda f: _edit(f, init_lora_weights="pissa_niter_4"), "takes a part of the base weight away"),
    "other type": (lambda f: _edit(f, peft_type="IA3"), "PEFT type IA3; allowed: LORA"),
    "other base": (lambda f: _edit(f, base_model_name_or_path="you/another-model"), "name different bases"),
    "other task type": (lambda f: _edit(f, task_type="SEQ_CLS"), "for different task types"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_cannot_be_an_expert(fault: str, tmp_path: Path) -> None:
    """Each ends in one line that names it, and the base is as it was."""
    loras = three_loras(tmp_path)
    for folder in loras.values():
        _edit(Path(folder), base_model_name_or_path="me/tiny-model")
    spoil, message = BROKEN[fault]
    spoil(Path(loras["words"]))
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ComposeError, match=message) as caught:
        from_loras(base, loras)
    assert "\n" not in str(caught.value)
    assert snapshot(base) == before


def test_a_lora_of_another_size(tmp_path: Path) -> None:
    loras = three_loras(tmp_path)
    base = tiny_model(intermediate_size=60)
    with pytest.raises(ComposeError, match=r"made for 52 inputs and 36 outputs at .*down_proj.*has \(60, 36\)"):
        from_loras(base, loras)
    with pytest.raises(ComposeError, match="no such module"):
        from_loras(tiny_model("gpt2"), loras)


def test_a_failing_fit_leaves_the_base_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelora.compose.routers.arrow import Arrow

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(Arrow, "fit", fail)
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(RuntimeError, match="no memory"):
        from_loras(base, three_loras(tmp_path), "arrow")
    assert snapshot(base) == before


def test_mixtures_are_no_experts(tmp_path: Path) -> None:
    model = from_loras(tiny_model(), three_loras(tmp_path))
    model.save_pretrained(str(tmp_path / "mix"))
    with pytest.raises(ComposeError, match="PEFT type MOELORA; allowed: LORA"):
        from_loras(tiny_model(), [str(tmp_path / "mix")])


def test_other_architectures(tmp_path: Path) -> None:
    """A Conv1D base and a base whose LoRA has embeddings."""
    lora = save_lora(tmp_path / "gpt", 0, "gpt2", target_modules=["c_attn", "c_fc"])
    model = from_loras(tiny_model("gpt2"), {"gpt": lora}, "task")
    expected = outputs(PeftModel.from_pretrained(tiny_model("gpt2"), str(lora)).eval(), "gpt2")
    found = outputs(model.base_model, "gpt2", task_ids=torch.zeros(3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    embeddings = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    embeddings.save_pretrained(str(tmp_path / "embed"))
    with pytest.raises(ComposeError, match="LoRAs of embeddings"):
        from_loras(tiny_model(), [str(tmp_path / "embed")])
