"""The papers' settings of every preset, written out once more."""

from __future__ import annotations

from typing import Any

from moelora.balance.bias_update import BiasUpdate
from moelora.balance.consistency import Consistency
from moelora.balance.localized import LocalizedBalance
from moelora.balance.mixtral import MixtralBalance
from moelora.balance.switch import SwitchBalance
from moelora.balance.tree import TreeSwitchBalance
from moelora.balance.z_loss import ZLoss
from moelora.experts.bottleneck import BottleneckExperts
from moelora.experts.dora import DoraExperts
from moelora.experts.grid import GridExperts
from moelora.experts.lora import LoraExperts
from moelora.experts.mpo import MpoExperts
from moelora.experts.phm import PhmExperts
from moelora.experts.poly import PolyExperts
from moelora.experts.residual_tree import ResidualTreeExperts
from moelora.experts.rounds import RoundsExperts
from moelora.experts.shards import ShardExperts
from moelora.experts.shared_a import SharedALoraExperts
from moelora.experts.slots import SlotExperts
from moelora.experts.vectors import VectorExperts
from moelora.inject.placement import (
    BlockPlacement,
    FeedForwardLinearsPlacement,
    FeedForwardPlacement,
    LinearPlacement,
    MoeBlockPlacement,
    PartsPlacement,
)
from moelora.scores.base_router import BaseRouterScores
from moelora.scores.constant import ConstantScores
from moelora.scores.intuition import IntuitionScores
from moelora.scores.linear import LinearScores
from moelora.scores.mlp import MlpScores
from moelora.scores.task_embedding import TaskEmbeddingScores
from moelora.scores.task_table import TaskTableScores
from moelora.scores.tree import TreeScores
from moelora.selection.dense import Dense
from moelora.selection.draw import Draw
from moelora.selection.learned_threshold import LearnedThreshold, ThresholdBalance
from moelora.selection.threshold import Threshold
from moelora.selection.top_k import TopK
from moelora.selection.top_p import TopP
from moelora.selection.tree import TreeTop

ACROSS_BLOCKS: dict[str, Any] = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "init": "normal",
    "init_std": (2 / 16) ** 0.5,
}
# The papers' settings (reference in each docstring), written out once more.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mixlora": {
        "experts": LoraExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=0.02),
        "selection": TopK(k=2, renormalize=True),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "mixdora": {
        "experts": DoraExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=0.02),
        "selection": TopK(k=2, renormalize=True),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "mixlora_dynamic": {
        "experts": LoraExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=0.02),
        "selection": TopP(p=0.8, renormalize=False),
        "balance": [MixtralBalance(coef=1e-3), ZLoss()],
    },
    "mixlora_switch": {
        "experts": LoraExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=1.0, jitter=0.01),
        "selection": TopK(k=1, renormalize=False, capacity=32),
        "balance": [SwitchBalance(coef=1e-3), ZLoss(coef=1e-3)],
    },
    "sira": {
        "experts": LoraExperts(num_experts=16, r=4, lora_alpha=4),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": TopK(k=4, renormalize=False, expert_dropout=0.5, capacity_factor=1.25),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "smora": {
        "experts": LoraExperts(num_experts=64, r=1, lora_alpha=16),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="sigmoid", init_std=None, bias=True),
        "selection": TopK(k=8, renormalize=True),
        "balance": [BiasUpdate(coef=1e-5)],
    },
    "molora": {
        "experts": LoraExperts(num_experts=10, r=4, lora_alpha=16, init="normal", init_std=0.02),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=0.02),
        "selection": Dense(),
        "balance": [],
    },
    "adamole": {
        "experts": LoraExperts(num_experts=8, r=4, lora_alpha=16, lora_dropout=0.05),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": LearnedThreshold(max_threshold=None),
        "balance": [ThresholdBalance(coef=1e-3), ZLoss()],
    },
    "hydralora": {
        "experts": SharedALoraExperts(num_experts=4, r=4, lora_alpha=32, lora_dropout=0.05),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": Dense(),
        "balance": [],
    },
    "llava_mole": {
        "experts": LoraExperts(num_experts=3, r=32, lora_alpha=64, lora_dropout=0.05),
        "placement": FeedForwardLinearsPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": TopK(k=1, renormalize=False, multiply_by_gate=False),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "loramoe": {
        "experts": LoraExperts(num_experts=8, r=4, lora_alpha=32, lora_dropout=0.05),
        "placement": PartsPlacement(parts=["gate", "up", "down"]),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": Dense(),
        "balance": [LocalizedBalance(coef=0.1, delta=0.1, first_tasks=[1])],
    },
    "mov": {
        "experts": VectorExperts(num_experts=10, per_head=True),
        "placement": PartsPlacement(parts=["key", "value", "down"]),
        "scores": LinearScores(activation="softmax", init_std=0.02),
        "selection": Dense(),
        "balance": [],
    },
    "adamole_fixed": {
        "experts": LoraExperts(num_experts=8, r=4, lora_alpha=16, lora_dropout=0.05),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": Threshold(threshold=None),
        "balance": [SwitchBalance(coef=1e-3), ZLoss()],
    },
    "moelora_task": {
        "experts": LoraExperts(num_experts=8, r=2, lora_alpha=4, lora_dropout=0.1, init="normal", init_std=0.01),
        "placement": LinearPlacement(routers="per_model"),
        "scores": TaskEmbeddingScores(num_tasks=8, features=64),
        "selection": Dense(),
        "balance": [],
    },
    "poly": {
        "experts": PolyExperts(num_experts=4, r=8),
        "placement": LinearPlacement(),
        "scores": TaskTableScores(num_tasks=8),
        "selection": Dense(),
        "balance": [],
    },
    "mhr": {
        "experts": PolyExperts(num_experts=16, r=8, num_splits=4),
        "placement": LinearPlacement(),
        "scores": TaskTableScores(num_tasks=8, groups=4),
        "selection": Dense(),
        "balance": [],
    },
    "mola": {
        "experts": LoraExperts(num_experts=8, r=8, lora_alpha=16, lora_dropout=0.05, per_layer=[2, 4, 6, 8]),
        "placement": LinearPlacement(),
        "scores": LinearScores(activation="softmax", init_std=None),
        "selection": TopK(k=2, renormalize=True),
        "balance": [],
    },
    "perft_r": {
        "experts": LoraExperts(**ACROSS_BLOCKS, num_experts=4),
        "placement": MoeBlockPlacement(),
        "scores": LinearScores(init_std=None),
        "selection": TopK(k=2, renormalize=True),
        "balance": [MixtralBalance(coef=1e-2), ZLoss()],
    },
    "perft_e": {
        "experts": LoraExperts(**ACROSS_BLOCKS, num_experts=8),
        "placement": MoeBlockPlacement(),
        "scores": BaseRouterScores(),
        "selection": Dense(),
        "balance": [],
    },
    "perft_d": {
        "experts": LoraExperts(**ACROSS_BLOCKS, num_experts=2),
        "placement": MoeBlockPlacement(),
        "scores": ConstantScores(weights=[1.0, 1.0]),
        "selection": Dense(),
        "balance": [],
    },
    "perft_s": {
        "experts": LoraExperts(**ACROSS_BLOCKS, num_experts=1),
        "placement": MoeBlockPlacement(),
        "scores": ConstantScores(weights=[1.0]),
        "selection": Dense(),
        "balance": [],
    },
    "mixphm": {
        "experts": PhmExperts(num_experts=4, reduction=12, summands=4, rank=8, scale=1.0),
        "placement": PartsPlacement(parts=["down"]),
        "scores": ConstantScores(),
        "selection": Draw(),
        "balance": [],
    },
    "soft_moa": {
        "experts": SlotExperts(num_experts=4, slots=1, bottleneck=16),
        "placement": BlockPlacement(),
        "scores": LinearScores(init_std=None),
        "selection": Dense(),
        "balance": [],
    },
    "smore": {
        "experts": ResidualTreeExperts(num_experts=20, sizes=[4, 4], r=4, activation="tanh", position="all"),
        "placement": LinearPlacement(),
        "scores": TreeScores(sizes=[4, 4], features=32),
        "selection": TreeTop(sizes=[4, 4], fan_out=[2, 2]),
        "balance": [TreeSwitchBalance(coef=1e-2, sizes=[4, 4])],
    },
    "mor1e": {
        "experts": GridExperts(num_experts=32, rows=4, columns=8),
        "placement": LinearPlacement(),
        "scores": IntuitionScores(num_centroids=32, embedding="input"),
        "selection": Dense(),
        "balance": [],
    },
    "mos": {
        "experts": ShardExperts(r=8, lora_alpha=16, lora_dropout=0.1, equivalent_rank=2, shards=4, private=1, seed=0),
        "placement": LinearPlacement(unrouted_modules=".*"),
        "scores": LinearScores(),
        "selection": TopK(k=1),
        "balance": [],
    },
    "random_router": {
        "experts": LoraExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(activation="softmax", init_std=0.02, trainable=False),
        "selection": TopK(k=2, renormalize=True),
        "balance": [],
    },
    "mixda": {
        "experts": BottleneckExperts(num_experts=2, reduction=16),
        "placement": PartsPlacement(parts=["down"]),
        "scores": MlpScores(depth=4, size=768, dropout=0.2, per="sequence"),
        "selection": Dense(),
        "balance": [],
    },
    "mpoe": {
        "experts": MpoExperts(num_experts=8, r=16, lora_alpha=32, lora_dropout=0.05, ends=8, gradient_mask=0.75),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": LinearScores(init_std=0.02),
        "selection": TopK(k=2, renormalize=True),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "graphmoe": {
        "experts": RoundsExperts(num_experts=8, r=8, lora_alpha=16, lora_dropout=0.05, features=16, rounds=3),
        "placement": LinearPlacement(),
        "scores": LinearScores(init_std=0.02),
        "selection": TopK(k=2, renormalize=True),
        "balance": [SwitchBalance(coef=1e-2), ZLoss()],
    },
    "thor": {
        "experts": LoraExperts(num_experts=2, r=16, lora_alpha=32, lora_dropout=0.05),
        "placement": FeedForwardPlacement(unrouted_modules="rest"),
        "scores": ConstantScores(),
        "selection": Draw(),
        "balance": [Consistency(coef=2.5)],
    },
    "lora": {
        "experts": LoraExperts(num_experts=1, r=16, lora_alpha=32),
        "placement": LinearPlacement(unrouted_modules=".*"),
        "scores": LinearScores(),
        "selection": TopK(k=1),
        "balance": [],
    },
}
