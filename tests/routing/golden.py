"""Golden values: one sequence of three tokens and four experts, coefficient 1.

The numbers were computed with the methods' published code (MixLoRA and Switch: TUDB-Labs/MoE-PEFT at 40f8cb7; MoLA:
GCYZSL/MoLA at 01785c8; SMoRA: StyxXuan/smora at 7e7ada1; AdaMoLE: zefang-liu/AdaMoLE at 5e8599a) on these logits, to
six digits.
"""

from __future__ import annotations

import torch

from moelora.routing.decision import Routing
from moelora.routing.router import Router
from moelora.scores.base import Scores
from moelora.selection.base import Selection
from tests.routing.routers import SOFTMAX, every_token, new_router

LOGITS_TE = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.5, 1.0, -0.5], [-1.0, 0.0, 0.3, 2.0]])
SOFTMAX_TE = torch.tensor(
    [
        [0.643914, 0.236883, 0.087144, 0.032059],
        [0.167405, 0.276004, 0.455054, 0.101536],
        [0.036399, 0.098943, 0.133560, 0.731098],
    ]
)
TOP2_IDS_TK = torch.tensor([[0, 1], [2, 1], [3, 2]])
MIXLORA_WEIGHTS_TK = torch.tensor([[0.731059, 0.268941], [0.622459, 0.377541], [0.845535, 0.154465]])
MIXLORA_AUX = 1.905595
MIXLORA_AUX_LAST_TOKEN_MASKED = 2.379292
SWITCH_AUX = 1.061409  # also the MixLoRA paper's form, whose f counts the argmax
SWITCH_WEIGHTS_TK = torch.tensor([[0.643914], [0.455054], [0.731098]])
DYNAMIC_WEIGHTS = [[0.643914, 0.236883], [0.455054, 0.276004, 0.167405], [0.731098, 0.133560]]  # top_p 0.8
DYNAMIC_IDS = [[0, 1], [2, 1, 0], [3, 2]]
DYNAMIC_AUX = 2.282359
MOLA_AUX = 0.952797
Z_LOSS = 4.833345
GSHARD_AUX = {1: 0.066338, 2: 0.119100}
SMORA_GATES_TE = torch.tensor(
    [[1.092898, 0.907102, 0.0, 0.0], [0.0, 0.919765, 1.080235, 0.0], [0.0, 0.0, 0.789482, 1.210518]]
)  # times k = 2, as in the code
SMORA_BIAS_SIGN_E = torch.tensor([1.0, -1.0, -1.0, 1.0])
ADAMOLE_THRESHOLD_LOGITS_T = torch.tensor([0.0, 1.0, -1.0])
ADAMOLE_THRESHOLDS_T = torch.tensor([0.125, 0.182765, 0.067235])  # tau_max 1/4
ADAMOLE_WEIGHTS_TE = torch.tensor(
    [[0.822633, 0.177367, 0.0, 0.0], [0.0, 0.255081, 0.744919, 0.0], [0.0, 0.041617, 0.087052, 0.871331]]
)
MOLE_WEIGHTS_TE = torch.tensor(
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.377541, 0.622459, 0.0], [0.0, 0.0, 0.0, 1.0]]
)  # the threshold 1/4
ADAMOLE_AUX = 1.010853
LOCALIZED = {0: 0.0473905, 1: 0.0358209}  # LoRAMoE's by the type of the task, delta 0.1

ALL_VALID_T = torch.ones(3, dtype=torch.bool)


def router_of(selection: Selection, scores: Scores = SOFTMAX, num_experts: int = 4) -> Router:
    """A router whose logits are its input."""
    router = new_router(selection, scores, in_features=num_experts, num_experts=num_experts)
    router.get_parameter("weight").data.copy_(torch.eye(num_experts))
    return router


def golden_routing(selection: Selection, scores: Scores = SOFTMAX) -> Routing:
    """The decision for the golden logits."""
    found: Routing = router_of(selection, scores)(LOGITS_TE, every_token(1, 3))
    return found


def adamole_routing(selection: Selection, scores: Scores = SOFTMAX) -> Routing:
    """The same where the router has a learned threshold: a fifth feature of a token is its threshold's logit."""
    router = new_router(selection, scores, in_features=5)
    router.get_parameter("weight").data.copy_(torch.eye(4, 5))
    router.get_parameter("threshold_weight").data.copy_(torch.eye(5)[4:])
    router.get_parameter("threshold_bias").data.zero_()
    x_TD = torch.cat([LOGITS_TE, ADAMOLE_THRESHOLD_LOGITS_T.unsqueeze(1)], 1)
    found: Routing = router(x_TD, every_token(1, 3))
    return found
