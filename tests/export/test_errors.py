"""Bad input of every export: an error of ours, and nothing half-written."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moelora.errors import ExportError, FormatVersionError, HubError, MoeLoraError, TargetError
from moelora.export import distill_lora, export_loras, read_mixlora, write_mixlora
from tests.adapters import adapted
from tests.conftest import tiny_model
from tests.export.mixtures import base_folder, composition, saved


def _read(adapter: Any, output: Path, **words: Any) -> Path:
    """A folder of MixLoRA's authors, made of an adapter, read again."""
    theirs = output.parent / "theirs"
    if not theirs.exists():
        write_mixlora(adapter, theirs)
    return read_mixlora(theirs, output, **words)


def _distill(adapter: Any, output: Path, **words: Any) -> Path:
    return distill_lora(adapter, output, rank=2, **words).output


EXPORTS: dict[str, tuple[Callable[..., Path], str]] = {
    "loras": (export_loras, "task"),
    "one lora": (export_loras, "constant"),
    "distilled": (_distill, "mixlora"),
    "mixlora": (write_mixlora, "mixlora"),
    "moelora": (_read, "mixlora"),
}


@pytest.fixture(params=EXPORTS)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[..., Path], Path, Path]:
    """An export, and an adapter's folder that it takes with its base's."""
    export, kind = EXPORTS[request.param]
    base = base_folder(tmp_path / "base")
    model = adapted("mixlora") if kind == "mixlora" else composition(base, scores=kind)
    model.peft_config["default"].base_model_name_or_path = str(base)
    return export, saved(model, tmp_path / "adapter"), tmp_path / "out"


Case = tuple[Callable[..., Path], Path, Path]


def test_a_folder_in_the_way_is_left_alone(case: Case) -> None:
    export, adapter, output = case
    output.mkdir()
    (output / "half").write_text("an export that was killed by other means")
    with pytest.raises(ExportError, match=r"exists; allowed: a folder that does not exist yet"):
        export(adapter, output)
    assert [path.name for path in output.iterdir()] == ["half"]
    (output / "half").unlink()
    assert export(adapter, output) == output
    assert any(output.iterdir())


@contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 300 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_leaves_nothing(case: Case) -> None:
    export, adapter, output = case
    if export is _read:
        write_mixlora(adapter, output.parent / "theirs")
    before = sorted(output.parent.iterdir())
    with full_disk(), pytest.raises(ExportError, match=r"cannot be written: .* Nothing is left") as found:
        export(adapter, output)
    assert "\n" not in str(found.value)
    assert sorted(output.parent.iterdir()) == before


def test_another_base_is_refused(case: Case) -> None:
    export, adapter, output = case
    if export is _read:
        write_mixlora(adapter, output.parent / "theirs")
    tiny_model("llama", intermediate_size=60).save_pretrained(output.parent / "wider")
    with pytest.raises(TargetError, match="weights do not fit .* have another shape"):
        export(adapter, output, base=str(output.parent / "wider"))
    with pytest.raises(ExportError, match=r"the base model './none' cannot be read"):
        export(adapter, output, base="./none")
    assert not output.exists()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no folder"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no adapter_model.safetensors"),
    "no configuration": (lambda folder: (folder / "adapter_config.json").unlink(), "no adapter_config.json"),
    "half a configuration": (lambda folder: (folder / "adapter_config.json").write_text('{"a": '), "readable JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "holds a list"),
    "half the weights": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:5000]
        ),
        "not a readable safetensors file",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_adapters_are_refused(tmp_path: Path, damage: str) -> None:
    adapter = saved(composition(base_folder(tmp_path / "base")), tmp_path / "adapter")
    harm, message = DAMAGE[damage]
    harm(adapter)
    for export in (export_loras, write_mixlora, _distill):
        with pytest.raises((ExportError, HubError), match=message) as found:
            export(adapter, tmp_path / "out")
        assert "\n" not in str(found.value)
    assert not (tmp_path / "out").exists()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    adapter = saved(composition(base_folder(tmp_path / "base")), tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.model.layers.1.mlp.up_proj.moelora_B.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(TargetError, match="1 places get no tensor"):
        export_loras(adapter, tmp_path / "out")


def test_adapters_of_other_methods_and_formats_are_refused(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    lora = saved(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), tmp_path / "lora")
    with pytest.raises(ExportError, match="an adapter of type 'LORA'"):
        export_loras(lora, tmp_path / "out", base=str(base))
    with pytest.raises(ExportError, match="a LlamaForCausalLM holds no adapter"):
        export_loras(tiny_model(), tmp_path / "out")
    with pytest.raises(ExportError, match="called 'other'; allowed: default"):
        export_loras(composition(base), tmp_path / "out", adapter_name="other")
    adapter = saved(composition(base), tmp_path / "adapter")
    words = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**words, "format_version": 99}))
    with pytest.raises(FormatVersionError):
        export_loras(adapter, tmp_path / "out")


def test_embeddings_that_were_saved_along_are_refused(tmp_path: Path) -> None:
    model = composition(base_folder(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ExportError, match="more than experts and routers .*lm_head"):
        export_loras(tmp_path / "adapter", tmp_path / "out")


def test_a_base_that_is_not_known_is_asked_for(tmp_path: Path) -> None:
    model = composition(base_folder(tmp_path / "base"))
    model.peft_config["default"].base_model_name_or_path = None
    adapter = saved(model, tmp_path / "adapter")
    with pytest.raises(ExportError, match="does not record its base model"):
        export_loras(adapter, tmp_path / "out")
    with pytest.raises(MoeLoraError, match="the base model's name None"):
        write_mixlora(adapted("mixlora"), tmp_path / "out")
    export_loras(adapter, tmp_path / "out", base=str(tmp_path / "base"))
    assert LoraConfig.from_pretrained(str(tmp_path / "out" / "code")).base_model_name_or_path == str(tmp_path / "base")


def test_half_precision_stays_what_it_is(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = composition(base_folder(tmp_path / "base")).to(torch.bfloat16)
    export_loras(saved(model, tmp_path / "adapter"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "code" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    assert torch.equal(
        tensors["base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"],
        layer.lora_factors("", "default").b_EOR[1, :, :2],
    )
