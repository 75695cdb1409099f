"""Options on the axes that no preset has at its defaults: a preset, and the axes' words that make it have one."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "null experts": ("mixlora", {"experts": {"kind": "lora_with_null", "num_null": 2}}),
    "null experts of linears": ("sira", {"experts": {"kind": "lora_with_null", "num_null": 1}}),
    "shared experts": ("sira", {"experts": {"kind": "lora_with_shared", "num_shared": 2}}),
    "cosine scores": ("mixlora", {"scores": {"kind": "cosine", "features": 5}}),
    "cosine scores of linears": ("adamole", {"scores": {"kind": "cosine", "features": 5}}),
    "noisy logits": ("mixlora", {"scores": {"noise": True}}),
    "noisy logits of linears": ("sira", {"scores": {"noise": True}}),
    "straight-through top-1": ("mixlora", {"top_k": 1, "selection": {"renormalize": True, "straight_through": True}}),
    "dense in training": ("mixlora", {"selection": {"dense_in_training": True}}),
    "sparse mixer": ("sira", {"selection": {"kind": "sparse_mixer", "jitter": 0.9}}),
    "a tree with noise": ("smore", {"noise": True}),
    "a tree with noise and single children": ("smore", {"noise": True, "fan_out": [1, 1]}),
    "ranks of each expert": ("sira", {"experts": {"kind": "lora_ranks", "ranks": [1, 2, 3, 3]}}),
    "ranks of each expert of a block": (
        "mixlora",
        {"experts": {"kind": "lora_ranks", "ranks": [1, 2, 3, 3]}, "placement": {"unrouted_modules": None}},
    ),
    "a growing k": ("random_router", {"top_k": 1, "selection": "growing_top_k"}),
    "a bias that only selects": ("smora", {"scores": {"bias_weighs": False}}),
}
NOT_THE_BASE_AT_FIRST: set[str] = set()
"""Those that do not start at the base model."""
DRAWS: set[str] = set()
"""Those that draw in training, so that two forwards differ."""
