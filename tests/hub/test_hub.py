"""push_to_hub and read_adapter, with the real huggingface_hub client against the loopback Hub of conftest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

from moelora import MoeLoraConfig, push_to_hub
from moelora.errors import FormatVersionError, HubError
from moelora.hub import read_adapter
from tests.conftest import HUB, tiny_batch, tiny_model
from tests.hub_server import HubServer

REPO = "tester/adapter"


def make_adapter(model: str = "llama", preset: str = "mixlora", *, adapter_name: str = "default", **words: Any) -> Any:
    """A tiny model with an adapter whose B is not zero, so that it changes the outputs."""
    words = {"task_type": "SEQ_CLS" if model == "bert" else "CAUSAL_LM", "r": 8, **words}
    config = MoeLoraConfig.from_preset(preset, **words)
    peft_model = get_peft_model(tiny_model(model), config, adapter_name=adapter_name).eval()
    for name, parameter in peft_model.named_parameters():
        if "_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


@pytest.fixture
def base_on_hub(hub: HubServer) -> str:
    """The tiny Llama as a repository."""
    tiny_model("llama").push_to_hub("tester/base")
    return "tester/base"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter."""
    make_adapter().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(("model", "preset"), [("llama", "mixlora"), ("llama", "smora"), ("bert", "sira")])
def test_pushed_adapter_loads_bit_equal(hub: HubServer, model: str, preset: str) -> None:
    pushed = make_adapter(model, preset)
    push_to_hub(pushed, REPO)
    loaded = PeftModel.from_pretrained(tiny_model(model), REPO).eval()
    expected = {name: tensor for name, tensor in pushed.state_dict().items() if "moelora_" in name}
    actual = loaded.state_dict()
    assert len(expected) > 10
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
    batch = tiny_batch(model)
    assert torch.equal(loaded(**batch).logits, pushed(**batch).logits)


def test_named_adapter_is_uploaded_to_the_root(hub: HubServer) -> None:
    pushed = make_adapter(adapter_name="tuned")
    pushed.add_adapter("other", MoeLoraConfig.from_preset("mixlora", r=2, task_type="CAUSAL_LM"))
    push_to_hub(pushed, REPO, adapter_name="tuned")
    loaded = PeftModel.from_pretrained(tiny_model(), REPO).eval()
    batch = tiny_batch()
    assert torch.equal(loaded(**batch).logits, pushed(**batch).logits)
    with pytest.raises(HubError, match="no adapter 'missing'; the model has 'tuned', 'other'"):
        push_to_hub(pushed, REPO, adapter_name="missing")


def test_only_the_adapters_own_files_are_uploaded(hub: HubServer, saved: Path) -> None:
    (saved / "optimizer.pt").write_bytes(b"state")
    (saved / "training_args.bin").write_bytes(b"pickle")
    (saved / "tokenizer.json").write_text("{}")
    push_to_hub(saved, REPO)
    assert set(hub.files(REPO)) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"}


def test_the_cards_loading_code_runs(hub: HubServer, base_on_hub: str) -> None:
    base = type(tiny_model()).from_pretrained(base_on_hub)
    pushed = get_peft_model(base, MoeLoraConfig.from_preset("mixlora", r=4, task_type="CAUSAL_LM")).eval()
    push_to_hub(pushed, REPO)
    code = re.search(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1], names)
    batch = tiny_batch()
    assert torch.equal(names["model"].eval()(**batch).logits, pushed(**batch).logits)


def test_card_states_what_is_known(hub: HubServer, base_on_hub: str, saved: Path) -> None:
    push_to_hub(saved, REPO, base_model=base_on_hub, license="apache-2.0", datasets=["tester/data"])
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": base_on_hub,
        "library_name": "peft",
        "license": "apache-2.0",
        "datasets": ["tester/data"],
        "pipeline_tag": "text-generation",
        "tags": ["moelora", "lora", "mixture-of-lora-experts", "mixlora"],
    }
    info = read_adapter(saved)
    trained = f"{info.num_trainable:,} of them trained"
    for fact in (trained, "num_experts=8", "top_k(k=2, ", "`model.layers.*.mlp`", "0-1"):
        assert fact in card.text, fact
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] == base_on_hub


def test_card_tells_of_training_and_scores(hub: HubServer, saved: Path) -> None:
    rows = [
        {"task": "gcd", "metric": "exact", "value": 0.25, "stderr": 0.0433, "n": 100, "model": "base"},
        {"task": "gcd", "metric": "exact", "value": 0.5, "stderr": 0.05, "n": 100, "model": "mixlora"},
        {"task": "tally", "metric": "exact", "value": 0.125, "n": 80, "model": "mixlora"},
    ]
    run = {
        "model": "/secret/model",
        "dataset": {"hub": "tester/data", "split": "train[:50]", "tasks": None},
        "training": {"learning_rate": 0.001},
    }
    receipt = {
        "git": {"commit": "abc123", "dirty": True},
        "seeds": {"training": 42},
        "packages": {"torch": "2.13.0"},
        "config": {"training": {"learning_rate": "of another run"}},
    }
    training = {"steps": 150, "seconds": 61.2, "log": [{"loss": 2.5}, {"loss": 0.75}]}
    (saved / "metrics.json").write_text(json.dumps({"receipt": receipt, "scores": rows}))
    (saved / "training.json").write_text(json.dumps(training))
    (saved.parent / "config.yaml").write_text(yaml.safe_dump(run))
    push_to_hub(saved, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    for line in (
        "| task | metric | n | base | mixlora |",
        "| gcd | exact | 100 | 0.250 ± 0.043 | 0.500 ± 0.050 |",
        "| tally | exact | 80 |  | 0.125 |",
        "- data: [tester/data](https://huggingface.co/datasets/tester/data), split `train[:50]`",
        "- settings: `learning_rate=0.001`",
        "- 150 optimizer steps in 61 seconds",
        "- training loss: 2.500 at the first log, 0.750 at the last",
        "- commit abc123 with local changes",
        "- seed of training: 42",
        "- with torch 2.13.0",
    ):
        assert line in card.text.splitlines(), line
    assert card.data.to_dict()["datasets"] == ["tester/data"]
    assert not [name for name, data in hub.files(REPO).items() if b"/secret" in data or b"another run" in data]


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "hold no scores"), ('{"scores": [{"task": "gcd"}]}', "hold no scores"), ("{", "not valid JSON")],
)
def test_metrics_that_are_none_are_refused(hub: HubServer, saved: Path, content: str, message: str) -> None:
    (saved / "other.json").write_text(content)
    with pytest.raises(HubError, match=message):
        push_to_hub(saved, REPO, metrics=saved / "other.json")
    with pytest.raises(HubError, match="no file .*none.json"):
        push_to_hub(saved, REPO, metrics=saved / "none.json")
    assert not hub.repos


def test_card_leaves_out_what_is_unknown(hub: HubServer, saved: Path) -> None:
    push_to_hub(saved, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "its name on the Hub is not known" in card.text
    assert not re.search("more information needed|license|## scores", card.text, re.IGNORECASE)


def test_plain_lora_is_not_called_a_mixture(hub: HubServer) -> None:
    push_to_hub(make_adapter(preset="lora"), REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert card.data.to_dict()["tags"] == ["moelora", "lora"]
    assert "mixture" not in card.text.partition("## What it can be exported to")[0]
    assert "plain LoRA" in card.text


def test_a_local_base_is_named_nowhere(hub: HubServer, tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "secret-base")
    base = type(tiny_model()).from_pretrained(tmp_path / "secret-base")
    model = get_peft_model(base, MoeLoraConfig.from_preset("mixlora", r=4, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    assert "secret-base" in (tmp_path / "adapter" / "adapter_config.json").read_text()
    with pytest.warns(UserWarning, match="not on the Hub; the uploaded card and configuration do not name it"):
        push_to_hub(tmp_path / "adapter", REPO)
    assert not [name for name, data in hub.files(REPO).items() if b"secret-base" in data or b"/" + b"tmp" in data]
    assert "secret-base" in (tmp_path / "adapter" / "adapter_config.json").read_text()
    PeftModel.from_pretrained(model.unload(), REPO)


def test_a_relative_path_that_looks_like_a_hub_name_is_not_taken_for_one(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("models/base")
    tiny_model().push_to_hub("tester/unrelated")
    base = type(tiny_model()).from_pretrained("models/base")
    model = get_peft_model(base, MoeLoraConfig.from_preset("mixlora", r=4, task_type="CAUSAL_LM"))
    with pytest.warns(UserWarning, match="models/base"):
        push_to_hub(model, REPO)
    assert "base_model" not in ModelCard(hub.files(REPO)["README.md"].decode()).data.to_dict()


def test_a_given_base_must_exist(hub: HubServer, saved: Path) -> None:
    with pytest.raises(HubError, match="base_model 'tester/none' is not on the Hub"):
        push_to_hub(saved, REPO, base_model="tester/none")
    assert REPO not in hub.repos


def test_push_twice_replaces(hub: HubServer) -> None:
    first, second = make_adapter(), make_adapter(preset="smora")
    push_to_hub(first, REPO)
    push_to_hub(second, REPO, license="mit")
    files = hub.files(REPO)
    assert "`smora` adapter" in files["README.md"].decode()
    loaded = PeftModel.from_pretrained(tiny_model(), REPO).eval()
    batch = tiny_batch()
    assert torch.equal(loaded(**batch).logits, second(**batch).logits)
    assert len(hub.repos[REPO].commits) == 3


def test_revision_and_pull_request(hub: HubServer, saved: Path) -> None:
    push_to_hub(saved, REPO, revision="v1")
    assert hub.files(REPO) == {}
    assert "adapter_model.safetensors" in hub.files(REPO, "v1")
    PeftModel.from_pretrained(tiny_model(), REPO, revision="v1")
    commit = push_to_hub(saved, REPO, create_pr=True)
    assert commit.pr_url == f"{hub.url}/{REPO}/discussions/1"
    assert hub.files(REPO) == {}


def test_private(hub: HubServer, saved: Path) -> None:
    push_to_hub(saved, REPO, private=True)
    assert hub.repos[REPO].private
    push_to_hub(saved, REPO)
    assert read_adapter(REPO).config.preset == "mixlora"
    with pytest.raises(HubError, match="there is no such repository, or it is private"):
        read_adapter(REPO, token="hf_wrong")
    push_to_hub(saved, "tester/public")
    with pytest.raises(HubError, match="private is False, not True as asked for; nothing was uploaded"):
        push_to_hub(saved, "tester/public", private=True)


@pytest.mark.parametrize(
    ("repo", "token", "message"),
    [
        pytest.param(REPO, "hf_wrong", "the token was refused .* `hf auth login`", id="bad token"),
        pytest.param("nobody/adapter", None, "needs write permission for that owner", id="foreign namespace"),
        pytest.param("a/b/c", None, "'a/b/c' is not a repository name", id="bad name"),
    ],
)
def test_refused_push(hub: HubServer, saved: Path, repo: str, token: str | None, message: str) -> None:
    with pytest.raises(HubError, match=message):
        push_to_hub(saved, repo, token=token)
    assert not hub.repos


def test_no_connection(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = "http://127.0.0.1:9"
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(HUB.url, nobody)
    )
    monkeypatch.setattr(constants, "ENDPOINT", nobody)
    with pytest.raises(HubError, match="no connection .* Check the network"):
        push_to_hub(saved, REPO)
    with pytest.raises(HubError, match="no connection .* Check the network"):
        read_adapter(REPO)


@pytest.mark.parametrize("place", ["/lfs/upload/", "/commit/"])
def test_a_connection_that_breaks_while_pushing(
    hub: HubServer, saved: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is in the repository, and the same call once more is a whole push."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client tries an upload again after a while
    hub.broken = place
    with pytest.raises(HubError, match=f"cannot write '{REPO}' on .*: no connection .* Check the network"):
        push_to_hub(saved, REPO)
    assert not hub.files(REPO)
    hub.broken = ""
    push_to_hub(saved, REPO)
    assert hub.files(REPO)["adapter_model.safetensors"] == (saved / "adapter_model.safetensors").read_bytes()


def test_only_moelora_adapters_are_taken(hub: HubServer, tmp_path: Path) -> None:
    lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    other = get_peft_model(tiny_model(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    other.save_pretrained(tmp_path)
    with pytest.raises(HubError, match="says peft_type 'IA3', not 'MOELORA'"):
        read_adapter(tmp_path)
    for adapter, message in [
        (lora, "is of type"),
        (tmp_path, "holds an adapter of type 'IA3'; allowed: 'MOELORA', 'LORA', 'MIXLORA'"),
        (tiny_model(), "a LlamaForCausalLM holds no adapter"),
        (tmp_path / "none", "there is no folder"),
    ]:
        with pytest.raises(HubError, match=message):
            push_to_hub(adapter, REPO)
    assert not hub.repos


def test_read_from_the_hub_downloads_no_weights(hub: HubServer, saved: Path) -> None:
    push_to_hub(saved, REPO)
    hub.requests.clear()
    remote, local = read_adapter(REPO), read_adapter(saved)
    assert remote.tensors == local.tensors
    assert remote.sites() == local.sites()
    assert [line for line in hub.requests if "safetensors" in line] == [
        f"GET /{REPO}/resolve/main/adapter_model.safetensors"
    ]


def test_read_missing(hub: HubServer, tmp_path: Path, saved: Path) -> None:
    with pytest.raises(HubError, match="cannot read 'tester/none' on .*there is no such repository"):
        read_adapter("tester/none")
    HfApi().create_repo("tester/empty")
    with pytest.raises(HubError, match="it is not an adapter"):
        read_adapter("tester/empty")
    with pytest.raises(HubError, match="no folder './none'"):
        read_adapter("./none")
    with pytest.raises(HubError, match=f"Adapters inside it: {re.escape(str(saved))}"):
        read_adapter(tmp_path)


def test_read_damaged(saved: Path) -> None:
    weights = saved / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(HubError, match="not a readable safetensors file .* cut off"):
        read_adapter(saved)


def test_read_newer_format(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "format_version": 99}))
    with pytest.raises(FormatVersionError, match="99"):
        read_adapter(saved)


@pytest.mark.parametrize(
    ("model", "preset"),
    [("llama", "mixlora"), ("phi", "random_router"), ("t5", "smora"), ("bert", "sira"), ("llama", "lora")],
)
def test_counts_equal_the_models(tmp_path: Path, model: str, preset: str) -> None:
    adapter = make_adapter(model, preset)
    adapter.save_pretrained(tmp_path)
    info = read_adapter(tmp_path)
    assert info.num_trainable == adapter.get_nb_trainable_parameters()[0]
    assert info.num_parameters == sum(site.num_parameters for site in info.sites())
    assert info.num_bytes == 4 * info.num_parameters
    assert info.dtypes == ("F32",)


@pytest.mark.parametrize(
    ("preset", "words", "expected"),
    [
        ("mixlora", {}, {"mixture of 8 feed-forward experts (gate, up, down)", "plain LoRA"}),
        ("mixdora", {}, {"mixture of 8 feed-forward DoRA experts (gate, up, down)", "plain DoRA"}),
        (
            "mixlora",
            {"experts": {"kind": "lora_with_null", "num_null": 2}},
            {"mixture of 6 and 2 null feed-forward experts (gate, up, down)", "plain LoRA"},
        ),
        (
            "sira",
            {"num_experts": 4, "experts": {"kind": "lora_with_shared", "num_shared": 2}},
            {"mixture of 4 routed and 2 shared LoRA experts"},
        ),
        ("poly", {"num_experts": 4, "num_tasks": 3}, {"mixture of 4 poly experts"}),
    ],
)
def test_the_table_says_what_stands_at_a_site(
    tmp_path: Path, preset: str, words: dict[str, Any], expected: set[str]
) -> None:
    make_adapter(preset=preset, **words).save_pretrained(tmp_path)
    sites = read_adapter(tmp_path).sites()
    assert {site.describe() for site in sites} == expected
    assert {site.kind for site in sites if not site.kind.endswith(("mixture", "experts"))} == {
        phrase for phrase in expected if phrase.startswith("plain")
    }
