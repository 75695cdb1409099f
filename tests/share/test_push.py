"""Everything that can be uploaded: up to the loopback Hub, and down again in another process by its card's own code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from moelora import push_to_hub
from moelora.errors import MoeLoraError
from moelora_cli import main
from tests.hub_server import HubServer
from tests.share.folders import BASE, KINDS, base_on_hub, composition, lora, loras, mixlora, native

_SCRIPT = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer
for folder in map(Path, sys.argv[3:]):
    names = {}
    exec((folder / "card.py").read_text().replace("'my-adapter'", repr(str(folder / "my-adapter"))), names)
    ids = AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = names["model"].eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    save_file({"logits": logits.float().contiguous()}, folder / "logits.safetensors")
"""

METADATA = {
    "composition": ("peft", {"moelora", "lora", "mixture-of-lora-experts"}),
    "edited": ("peft", {"moelora", "lora", "mixture-of-lora-experts"}),
    "loras": ("peft", {"moelora", "lora", "multi-lora"}),
    "distilled": ("peft", {"moelora", "lora"}),
    "mixlora": ("moelora", {"moelora", "lora", "mixture-of-lora-experts", "mixlora"}),
    "native": ("transformers", {"moelora", "mixture-of-experts", "mixlora"}),
}
FILES = {
    "composition": {"adapter_config.json", "adapter_model.safetensors"},
    "edited": {"adapter_config.json", "adapter_model.safetensors"},
    "loras": {"router.json", "router.safetensors", "route.py", "moelora_export.json"}
    | {
        f"{name}/{file}"
        for name in ("maths", "code-words", "prose")
        for file in ("adapter_config.json", "adapter_model.safetensors")
    },
    "distilled": {"adapter_config.json", "adapter_model.safetensors", "moelora_export.json"},
    "mixlora": {"adapter_config.json", "adapter_model.bin", "moelora_export.json"},
}


def test_everything_goes_up_and_comes_down(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tests.share.folders import PROMPT, logits

    base_on_hub(tmp_path / "base")
    expected, folders = {}, {}
    for kind, make in KINDS.items():
        folder, model = make(tmp_path / kind)
        (folder / "optimizer.pt").write_bytes(b"state")
        expected[kind] = logits(model)
        repo = f"tester/{kind}"
        assert main(["push", str(folder), repo]) == 0, capsys.readouterr().err
        files = hub.files(repo)
        if kind == "native":
            shards = [name for name in files if name.endswith(".safetensors")]
            assert len(shards) > 1
            assert {"config.json", "model.safetensors.index.json", "tokenizer.json", "README.md"} <= set(files)
            assert "optimizer.pt" not in files
        else:
            assert set(files) == FILES[kind] | {"README.md"}
        card = ModelCard(files["README.md"].decode())
        library, tags = METADATA[kind]
        words = card.data.to_dict()
        assert (words["base_model"], words["library_name"]) == (BASE, library)
        assert words["pipeline_tag"] == "text-generation"
        assert set(words["tags"]) == tags
        assert "license" not in words
        assert not [name for name, data in files.items() if str(tmp_path).encode() in data], kind
        code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)
        assert code
        folders[kind] = tmp_path / "down" / kind
        folders[kind].mkdir(parents=True)
        (folders[kind] / "card.py").write_text(code[1])
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, BASE, PROMPT, *map(str, folders.values())],
        env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for kind, folder in folders.items():
        found = load_file(folder / "logits.safetensors")["logits"]
        if kind in ("composition", "edited", "distilled"):
            assert torch.equal(found, expected[kind]), kind
        else:  # merged weights and mixtures of one expert are other sums
            torch.testing.assert_close(found, expected[kind], atol=1e-4, rtol=1e-4)


def _without_tensor(file: Path, ending: str) -> None:
    tensors = load_file(file)
    (name, *_) = [name for name in tensors if name.endswith(ending)]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


def _edit(file: Path, **words: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))


def _without_a_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def _other_shard(folder: Path) -> None:
    first, second, *_ = sorted(folder.glob("model-*.safetensors"))
    shutil.copyfile(first, second)


HARM: list[tuple[str, Callable[[Path], object], str]] = [
    ("composition", lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    ("composition", lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors missing"),
    ("composition", lambda f: _without_tensor(f / "adapter_model.safetensors", "moelora_A.weight"), "lacks model"),
    ("composition", lambda f: _without_tensor(f / "adapter_model.safetensors", "router.prototypes"), "lacks model"),
    ("loras", lambda f: (f / "router.json").unlink(), "has LoRAs in code-words, maths, prose, and no router.json"),
    ("loras", lambda f: (f / "router.safetensors").unlink(), "router.safetensors is missing"),
    ("loras", lambda f: _without_tensor(f / "router.safetensors", "center"), "allowed: centroids"),
    ("loras", lambda f: shutil.rmtree(f / "prose"), "prose/adapter_config.json is missing"),
    ("loras", lambda f: (f / "prose/adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    ("loras", lambda f: _without_tensor(f / "prose/adapter_model.safetensors", "lora_B.weight"), "lora_B.weight"),
    ("loras", lambda f: _edit(f / "router.json", loras=["../loras/maths"]), "lists the LoRA '../loras/maths'"),
    ("loras", lambda f: _edit(f / "router.json", loras="maths"), "str as loras"),
    ("native", _without_a_shard, "is missing"),
    ("native", _other_shard, "and it is not there"),
    ("native", lambda f: (f / "moelora_export.json").unlink(), "moelora_export.json is missing"),
    ("native", lambda f: (f / "config.json").unlink(), "is nothing to upload"),
    ("native", lambda f: _edit(f / "moelora_export.json", num_bytes=1), "tensors are missing"),
    ("native", lambda f: _edit(f / "moelora_export.json", form="lora"), "of an export in the form 'lora'"),
    ("loras", lambda f: _edit(f / "moelora_export.json", adapter={}), "lacks axes, frozen, members, preset, recipe"),
    ("loras", lambda f: (f / "moelora_export.json").write_text("{"), "not a readable JSON file"),
    ("mixlora", lambda f: (f / "adapter_model.bin").unlink(), "adapter_model.bin is missing"),
    ("mixlora", lambda f: torch.save({}, f / "adapter_model.bin"), "holds no experts"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of several kinds, by their names; nothing of the Hub is needed to refuse them."""
    folder = tmp_path_factory.mktemp("made")
    base_on_hub(folder / "base")
    for make in (composition, loras, native, mixlora):
        make(folder / make.__name__)[0].rename(folder / f"{make.__name__}-whole")
    return folder


@pytest.mark.parametrize(("kind", "harm", "message"), HARM, ids=[f"{kind}-{message}" for kind, _, message in HARM])
def test_half_a_folder_is_refused_before_anything_is_made(
    made: Path, hub: HubServer, tmp_path: Path, kind: str, harm: Callable[[Path], object], message: str
) -> None:
    shutil.copytree(made / f"{kind}-whole", tmp_path / kind)
    harm(tmp_path / kind)
    with pytest.raises(MoeLoraError) as found:
        push_to_hub(tmp_path / kind, "tester/half")
    assert message in str(found.value)
    assert "\n" not in str(found.value)
    assert "tester/half" not in hub.repos


def test_a_lora_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    """One that moelora did not make: its card claims nothing of moelora."""
    base_on_hub(tmp_path / "base")
    push_to_hub(lora(tmp_path / "lora", 1, r=3), "tester/lora", license="mit")
    card = ModelCard(hub.files("tester/lora")["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": BASE,
        "library_name": "peft",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["lora"],
    }
    assert "| 3 | 5 | `q_proj, up_proj` |" in card.text
    assert "Exported" not in card.text


def test_other_models_are_refused(hub: HubServer, tmp_path: Path) -> None:
    base_on_hub(tmp_path / "base")
    with pytest.raises(MoeLoraError, match="not one that `moelora export --to native-moe` wrote"):
        push_to_hub(tmp_path / "base", "tester/other")
    assert "tester/other" not in hub.repos


def test_something_else_is_not_put_beside_what_is_there(hub: HubServer, tmp_path: Path) -> None:
    base_on_hub(tmp_path / "base")
    adapter, _ = composition(tmp_path / "a")
    several, _ = loras(tmp_path / "b")
    push_to_hub(adapter, "tester/mine")
    push_to_hub(adapter, "tester/mine")  # the same once more
    before = hub.files("tester/mine")
    with pytest.raises(MoeLoraError, match=r"holds adapter_config\.json, adapter_model\.safetensors of something"):
        push_to_hub(several, "tester/mine")
    assert hub.files("tester/mine") == before


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("training.json", {"foo": 1}),
        ("training.json", {"steps": 1, "seconds": "x"}),
        ("training.json", {"steps": 1, "seconds": 2, "log": [{"loss": "low"}]}),
        ("metrics.json", [{"task": "a", "metric": "exact", "value": "x"}]),
        ("metrics.json", {"scores": [{"task": "a", "metric": "exact", "value": 0.5}], "receipt": []}),
    ],
)
def test_records_that_are_none_are_refused_before_anything_is_made(
    hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: object
) -> None:
    base_on_hub(tmp_path / "base")
    adapter, _ = composition(tmp_path / "a")
    (adapter / file).write_text(json.dumps(content))
    capsys.readouterr()  # bars of the preparation
    assert main(["push", str(adapter), "tester/new"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("training.json" if file == "training.json" else "hold no scores") in error
    assert "tester/new" not in hub.repos
