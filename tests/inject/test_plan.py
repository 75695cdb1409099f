"""Which module gets which layer, and what is refused, with nothing left half-applied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from moelora import MoeLoraConfig
from moelora.errors import AdapterNameError, TargetError
from moelora.inject.placement import FeedForwardPlacement, LinearPlacement, Placement
from moelora.inject.plan import plan_sites
from moelora.inject.targets import resolve_all_linear
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.linear import MixtureLinear
from tests.adapters import PRESETS, adapted, outputs, shake, small_config, snapshot, tuner_layers
from tests.conftest import MODEL_NAMES, tiny_batch, tiny_model

# For each architecture: the prefix of its layers, the linears of attention in each, the block, the linears in it.
QKVO = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
DECODERS: dict[str, tuple[str, list[str], str, list[str]]] = {
    **dict.fromkeys(
        ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"], ("model.layers", QKVO, "mlp", GATED)
    ),
    "phi": ("model.layers", [*QKVO[:3], "self_attn.dense"], "mlp", ["fc1", "fc2"]),
    "phi3": ("model.layers", ["self_attn.qkv_proj", "self_attn.o_proj"], "mlp", ["gate_up_proj", "down_proj"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj"], "mlp", ["c_fc", "c_proj"]),
}


def expected_sites(name: str) -> tuple[set[str], set[str], set[str]]:
    """Names of the attention linears, of the feed-forward blocks and of the feed-forward linears of a tiny model."""
    attention, blocks, linears = set(), set(), set()
    if name == "t5":
        for stack, layers in (("encoder", ["SelfAttention"]), ("decoder", ["SelfAttention", "EncDecAttention"])):
            for index in range(2):
                prefix = f"{stack}.block.{index}.layer"
                attention |= {f"{prefix}.{i}.{kind}.{x}" for i, kind in enumerate(layers) for x in "qkvo"}
                block = f"{prefix}.{len(layers)}.DenseReluDense"
                blocks.add(block)
                linears |= {f"{block}.wi", f"{block}.wo"}
    elif name == "bert":
        attention.add("bert.pooler.dense")
        for index in range(2):
            prefix = f"bert.encoder.layer.{index}"
            attention |= {f"{prefix}.attention.self.{x}" for x in ("query", "key", "value")}
            attention.add(f"{prefix}.attention.output.dense")
            blocks.add(f"{prefix}.intermediate")
            linears |= {f"{prefix}.intermediate.dense", f"{prefix}.output.dense"}
    else:
        layers_name, names, block, parts = DECODERS[name]
        for index in range(2):
            attention |= {f"{layers_name}.{index}.{x}" for x in names}
            blocks.add(f"{layers_name}.{index}.{block}")
            linears |= {f"{layers_name}.{index}.{block}.{x}" for x in parts}
    return attention, blocks, linears


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_mixture_on_every_linear(name: str) -> None:
    attention, _, linears = expected_sites(name)
    model = get_peft_model(tiny_model(name), small_config("sira", name))
    layers = tuner_layers(model)
    assert set(layers) == attention | linears
    assert all(isinstance(layer, MixtureLinear) and "default" in layer.moelora_router for layer in layers.values())


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_feed_forward_mixtures_and_plain_lora_on_the_rest(name: str) -> None:
    attention, blocks, _ = expected_sites(name)
    model = get_peft_model(tiny_model(name), small_config("mixlora", name))
    layers = tuner_layers(model)
    assert set(layers) == attention | blocks
    for block in blocks:
        layer = layers[block]
        assert isinstance(layer, MixtureFeedForward)
        assert "default" in layer.moelora_router
        assert all(layer.lora_factors(role, "default") is not None for role in layer.linear_sizes())
    for linear in attention:
        assert isinstance(layers[linear], MixtureLinear)
        assert not layers[linear].moelora_router
        assert layers[linear].moelora_A["default"].weight.shape[0] == 1


def test_lora_preset_has_no_router() -> None:
    layers = tuner_layers(get_peft_model(tiny_model(), small_config("lora")))
    assert layers
    assert not any(layer.moelora_router for layer in layers.values())


def sites(config: MoeLoraConfig, name: str = "llama") -> dict[str, tuple[tuple[str, ...], bool]]:
    """The plan: linears with experts, and whether there is a router, by the site's name without "model.layers."."""
    plan = plan_sites(tiny_model(name), config)
    return {key.removeprefix("model.layers."): (site.roles, site.routed) for key, site in plan.items()}


BLOCK = ("down", "gate", "up")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            {"target_modules": ["up_proj", "down_proj"]},
            {"0.mlp": (("down", "up"), True), "1.mlp": (("down", "up"), True)},
        ),
        ({"target_modules": r".*\.1\.mlp\.gate_proj"}, {"1.mlp": (("gate",), True)}),
        (
            {"target_modules": ["q_proj", *GATED], "layers_to_transform": 1},
            {"1.self_attn.q_proj": (("",), False), "1.mlp": (BLOCK, True)},
        ),
        (
            {"target_modules": GATED, "layers_to_transform": [0], "layers_pattern": "layers"},
            {"0.mlp": (BLOCK, True)},
        ),
        (
            {"target_modules": ["layers.1.mlp.up_proj", "layers.0.self_attn.v_proj"]},
            {"0.self_attn.v_proj": (("",), False), "1.mlp": (("up",), True)},
        ),
        ({"target_modules": GATED, "exclude_modules": ["layers.0.mlp.up_proj", "layers.1.mlp.gate_proj"]},
         {"0.mlp": (("down", "gate"), True), "1.mlp": (("down", "up"), True)}),
        ({"target_modules": GATED, "modules_to_save": ["down_proj", "layers.0.mlp"]}, None),
    ],
)  # fmt: skip
def test_targets_of_a_block_preset(words: dict[str, Any], expected: dict[str, Any] | None) -> None:
    config = small_config("mixlora", **words)
    if expected is None:
        with pytest.raises(TargetError, match=r"modules_to_save.*down_proj"):
            sites(config)
    else:
        assert sites(config) == expected


@pytest.mark.parametrize(
    ("unrouted", "unrouted_sites"),
    [
        (None, set()),
        (["q_proj", "0.mlp.up_proj"], {"0.self_attn.q_proj", "0.mlp.up_proj"}),
        (r".*self_attn.*", {"0.self_attn.q_proj", "0.self_attn.v_proj"}),
    ],
)
def test_unrouted_modules_of_a_linear_preset(unrouted: Any, unrouted_sites: set[str]) -> None:
    targets = ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.up_proj"]
    config = MoeLoraConfig(target_modules=targets, placement={"kind": "linear", "unrouted_modules": unrouted})
    plan = sites(config)
    assert len(plan) == 3
    assert {key for key, (_, routed) in plan.items() if not routed} == unrouted_sites


def test_some_unrouted_and_some_routed_beside_a_block() -> None:
    placement = {"kind": "feed_forward", "unrouted_modules": ["q_proj"]}
    config = MoeLoraConfig(target_modules=["q_proj", "v_proj", *GATED], layers_to_transform=[0], placement=placement)
    plan = sites(config)
    assert {key: routed for key, (_, routed) in plan.items()} == {
        "0.self_attn.q_proj": False,
        "0.self_attn.v_proj": True,
        "0.mlp": True,
    }


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_all_linear_means_the_same_on_a_wrapped_model(name: str) -> None:
    fresh, second = small_config("sira", name), small_config("sira", name)
    resolve_all_linear(tiny_model(name), fresh)
    model = adapted("smora", name)
    resolve_all_linear(model.get_base_model(), second)
    assert second.target_modules == fresh.target_modules
    model.add_adapter("second", small_config("sira", name))
    assert model.peft_config["second"].target_modules == fresh.target_modules
    assert all({"default", "second"} <= set(layer.moelora_A) for layer in tuner_layers(model).values())


def test_all_linear_keeps_a_linear_that_is_only_named_like_a_head() -> None:
    model = tiny_model()
    model.model.layers[0].score = nn.Linear(36, 36)
    config = small_config("sira")
    resolve_all_linear(model, config)
    assert "score" in config.target_modules
    get_peft_model(model, small_config("smora"))
    second = small_config("sira")
    resolve_all_linear(model, second)
    assert second.target_modules == config.target_modules


class Network(nn.Module):
    """Not a transformers model: two blocks, the second odd, and a linear outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"good": Block(), "odd": OddBlock()})
        self.out = nn.Linear(6, 2)
        self.embed = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.inner["odd"](self.inner["good"](x)))
        return y


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(6, 10), nn.Linear(10, 6), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)))
        return y


class OddBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.up(x)).clamp(-1, 1))
        return y


def refuse(model: nn.Module, config: MoeLoraConfig, message: str, kind: type[Exception] = TargetError) -> None:
    """The configuration is refused in every way of adding it, and the model stays as it was."""
    before = snapshot(model)
    with pytest.raises(kind, match=message):
        config.num_trainable_parameters(model)
    for add in (
        lambda: get_peft_model(model, config),
        lambda: inject_adapter_in_model(config, model, "default"),
    ):
        with pytest.raises(kind, match=message):
            add()
        assert snapshot(model) == before


def test_a_plain_network_works() -> None:
    config = MoeLoraConfig(target_modules=["up", "down"], exclude_modules=["odd.up", "odd.down"])
    config.placement = FeedForwardPlacement(unrouted_modules=None)
    model = get_peft_model(Network(), config)
    assert set(tuner_layers(model)) == {"inner.good"}


def test_an_odd_block_is_refused_by_name() -> None:
    config = MoeLoraConfig(placement="feed_forward")
    refuse(Network(), config, r"feed-forward block 'inner\.odd' \(OddBlock\) fits none of the known forms")


@pytest.mark.parametrize(
    ("preset", "words", "message"),
    [
        ("sira", {"target_modules": ["qkv"]}, r"match no module of LlamaForCausalLM; its linears end in: down_proj, "),
        ("sira", {"target_modules": ["q_proj"], "layers_to_transform": [7]}, r"layers_to_transform=\[7\].* match no"),
        ("sira", {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, r"exclude_modules=\{'q_proj'\}"),
        ("sira", {"target_modules": r"q_proj"}, "match no module"),
        ("sira", {"target_modules": ["mlp"]}, r"target 'model\.layers\.0\.mlp' is a LlamaMLP; allowed: linears"),
        ("mixlora", {"target_modules": ["mlp", "gate_proj"]}, r"target 'model\.layers\.0\.mlp' is a LlamaMLP"),
        ("sira", {"target_modules": ["embed_tokens"]}, r"'model\.embed_tokens' is a Embedding; allowed: linears"),
        ("sira", {"target_modules": r".*norm"}, "LlamaRMSNorm; allowed: linears"),
        ("mixlora", {"target_modules": ["q_proj", "v_proj"]}, "none of the targeted linears is in a feed-"),
        ("sira", {"modules_to_save": ["lm_heed"]}, r"modules_to_save.*lm_heed.*match no module"),
        ("sira", {"modules_to_save": ["proj"]}, r"modules_to_save.*'proj'.*q_proj"),
        ("sira", {"modules_to_save": ["attn"]}, r"modules_to_save.*'attn'.*self_attn"),
        ("mixlora", {"modules_to_save": ["act_fn"]}, r"modules_to_save.*'act_fn'.*mlp"),
        ("mixlora", {"target_modules": ["up_proj"], "modules_to_save": ["gate_proj"]}, "modules_to_save.*'gate_proj'"),
        ("sira", {"trainable_token_indices": {"wte": [1]}}, "trainable_token_indices.*'wte'.*match no embedding"),
        ("sira", {"trainable_token_indices": {"q_proj": [1]}}, "trainable_token_indices.*'q_proj'.*match no embedding"),
        ("sira", {"trainable_token_indices": [1, 97]}, r"trainable_token_indices.*97.*0 to 96"),
        ("sira", {"trainable_token_indices": [1], "modules_to_save": ["embed_tokens"]}, "embed_tokens.* not both"),
    ],
)  # fmt: skip
def test_targets_that_do_not_fit_are_refused(preset: str, words: dict[str, Any], message: str) -> None:
    refuse(tiny_model(), small_config(preset, **words), message)


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        (LinearPlacement(unrouted_modules=["q_prj"]), r"unrouted_modules=\['q_prj'\] match none of the targets"),
        (LinearPlacement(unrouted_modules=r"q_proj"), r"unrouted_modules='q_proj' match none of the targets"),
        (
            FeedForwardPlacement(unrouted_modules=["q_proj", "down_proj"]),
            r"unrouted_modules.*'model\.layers\.0\.mlp\.down_proj'.*feed-forward block",
        ),
    ],
)
def test_unrouted_modules_that_do_not_fit_are_refused(placement: Placement, message: str) -> None:
    refuse(tiny_model(), MoeLoraConfig(placement=placement), message)


def test_mamba_projections_are_refused() -> None:
    # its fused kernels read the weight of out_proj directly: an adapter there would be ignored without a word
    model = MambaForCausalLM(MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=11, state_size=4))
    refuse(
        model,
        small_config("sira", target_modules=["in_proj", "out_proj"]),
        r"'backbone.*out_proj' cannot be adapted.*MambaMixer",
    )
    get_peft_model(model, small_config("sira", target_modules=["in_proj"]))


def test_tensor_parallel_models_are_refused() -> None:
    model = tiny_model()
    model._tp_size = 2
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"split by tensor parallelism \(2 ways\); allowed: 1"):
        get_peft_model(model, small_config("sira"))
    assert snapshot(model) == before


BAD_NAMES = [
    "0",
    "q_proj",
    "layers",
    "model",
    "a.b",
    "a/b",
    "..",
    "",
    "keys",
    "update",
    "forward",
    "base_layer",
    "weight",
    "moelora_A",
    "moelora_router",
    "modules_to_save",
    "original_module",
    "base_model",
    "__base__",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_unusable_adapter_names_are_refused(name: str) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match="allowed"):
        get_peft_model(model, small_config("mixlora"), adapter_name=name)
    assert snapshot(model) == before
    model = adapted("mixlora")
    before = snapshot(model)
    with pytest.raises(AdapterNameError, match="allowed"):
        model.add_adapter(name, small_config("mixlora"))
    assert snapshot(model) == before
    assert set(model.peft_config) == {"default"}


@pytest.mark.parametrize("name", ["default", "math", "my-adapter_2", "ref", "Ä"])
def test_ordinary_adapter_names_work(name: str) -> None:
    assert adapted("mixlora", adapter_name=name).active_adapters == [name]


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            "mixlora",
            "sira",
            r"another one on this model wraps '.*0\.mlp' as a whole block; allowed: adapters",
        ),
        ("sira", "mixlora", r"wraps 'model\.layers\.0\.mlp' as a whole block, another one .* wraps '.*mlp\.gate_proj'"),
    ],
)
@pytest.mark.parametrize("way", ["peft", "transformers", "inject"])
def test_adapters_that_treat_a_block_differently_are_refused(first: str, second: str, message: str, way: str) -> None:
    model = tiny_model()
    if way == "peft":
        model = get_peft_model(model, small_config(first))
        add = lambda: model.add_adapter("second", small_config(second))  # noqa: E731
    else:
        model.add_adapter(small_config(first))
        if way == "transformers":
            add = lambda: model.add_adapter(small_config(second), "second")  # noqa: E731
        else:
            add = lambda: inject_adapter_in_model(small_config(second), model, "second")  # noqa: E731
    shake(model)
    before, logits = snapshot(model), outputs(model)
    with pytest.raises(TargetError, match=message):
        add()
    assert snapshot(model) == before
    assert torch.equal(outputs(model), logits)
    assert set(model.peft_config) == {"default"}
    assert model.active_adapters() == ["default"] if way != "peft" else model.active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_another_methods_adapter_on_a_target_is_refused() -> None:
    model = tiny_model()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    refused = small_config("sira", target_modules=["q_proj", "v_proj"])
    before = snapshot(model)
    with pytest.raises(TargetError, match=r"self_attn\.q_proj' already carries a Linear of another PEFT method"):
        model.add_adapter(refused, "moe")
    assert snapshot(model) == before
    assert set(model.peft_config) == {"lora"}


def test_a_state_dict_that_names_other_modules_is_refused_before_anything_is_changed() -> None:
    # the first keys fit, so that an error in the middle would leave some modules replaced
    model = tiny_model()
    before = snapshot(model)
    state_dict = {
        "model.layers.0.self_attn.q_proj.moelora_A.weight": torch.zeros(4, 3, 36),
        "model.layers.1.mlp.up_proj.moelora_A.weight": torch.zeros(4, 3, 36),
    }
    config = small_config("sira", target_modules=["q_proj"])
    with pytest.raises(TargetError, match=r"weights name .*layers\.1\.mlp\.up_proj.*does not target"):
        inject_adapter_in_model(config, model, "default", state_dict=state_dict)
    assert snapshot(model) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_plan_follows_the_order_of_the_model(preset: str) -> None:
    model = tiny_model("phi")
    plan = list(plan_sites(model, small_config(preset, "phi")))
    order = [name for name, _ in model.named_modules()]
    assert plan == sorted(plan, key=order.index)


def test_replacing_an_adapter_of_the_same_name_leaves_nothing_of_the_old_one() -> None:
    model = tiny_model()
    inject_adapter_in_model(small_config("sira"), model, "default")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        inject_adapter_in_model(small_config("lora", target_modules=["q_proj"]), model, "default")
    held = {name: layer for name, layer in tuner_layers(model).items() if layer._get_available_adapters()}
    assert {name.rpartition(".")[-1] for name in held} == {"q_proj"}
    assert not any(layer.moelora_router for layer in held.values())
    assert isinstance(model(**tiny_batch()).logits, Tensor)


def test_peft_model_refuses_an_existing_name() -> None:
    model = adapted("mixlora")
    assert isinstance(model, PeftModel)
    before = snapshot(model)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("default", small_config("mixlora"))
    assert snapshot(model) == before
