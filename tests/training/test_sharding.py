"""What FSDP can shard of an adapter, and what is refused; two processes train under it in test_distributed.py."""

from __future__ import annotations

from typing import Any

import pytest

from moelora import MoeLoraTrainer
from moelora.errors import ConfigError
from moelora.routing.run import find_hooks
from moelora.training.sharding import prepare_sharding
from tests.adapters import adapted
from tests.training.runs import arguments


@pytest.mark.parametrize(
    ("preset", "words", "reason"),
    [
        ("smora", {}, "balance 'bias_update' moves the routers' biases"),
        ("moelora_task", {}, r"'model\.layers\.0\.\w+\.\w+' uses tensors that another layer holds"),
        ("mos", {}, "uses tensors that another layer holds"),
        ("mor1e", {}, "read embeddings of the base before it runs"),
    ],
)
def test_what_fsdp_would_leave_in_shards_is_refused(preset: str, words: dict[str, Any], reason: str) -> None:
    model = adapted(preset, **words)
    hooks = find_hooks(model)
    assert hooks is not None
    with pytest.raises(ConfigError, match=f"adapter 'default' cannot be trained under FSDP.*{reason}.*Allowed: data"):
        prepare_sharding(model, hooks)


@pytest.mark.parametrize(
    ("preset", "words"), [("smora", {"bias_update_rate": 0.0}), ("sira", {"routers": "per_input"}), ("hydralora", {})]
)
def test_what_is_within_a_layer_is_sharded(preset: str, words: dict[str, Any]) -> None:
    model = adapted(preset, **words)
    hooks = find_hooks(model)
    assert hooks is not None
    prepare_sharding(model, hooks)
    assert model.peft_config["default"].base_fingerprint["architecture"] == "llama"


def test_zero_3_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers knows of it from its arguments, which need deepspeed to say so."""
    monkeypatch.setattr("moelora.training.sharding.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ConfigError, match=r"stage is 3: .*; allowed: stage 1 or 2, or FSDP2"):
        MoeLoraTrainer(model=adapted("mixlora"), args=arguments(), train_dataset=[])
