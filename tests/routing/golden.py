"""Golden values: one sequence of three tokens and four experts, coefficient 1.

The numbers were computed with the methods' published code (MixLoRA and Switch: TUDB-Labs/MoE-PEFT at 40f8cb7; MoLA:
GCYZSL/MoLA at 01785c8; SMoRA: StyxXuan/smora at 7e7ada1) on these logits, to six digits.
"""

from __future__ import annotations

import torch

from moelora.config import RoutingConfig
from moelora.routing.decision import Routing
from moelora.routing.router import Router

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
MOLA_AUX = 0.952797
Z_LOSS = 4.833345
GSHARD_AUX = {1: 0.066338, 2: 0.119100}
SMORA_GATES_TE = torch.tensor(
    [[1.092898, 0.907102, 0.0, 0.0], [0.0, 0.919765, 1.080235, 0.0], [0.0, 0.0, 0.789482, 1.210518]]
)  # times k = 2, as in the code
SMORA_BIAS_SIGN_E = torch.tensor([1.0, -1.0, -1.0, 1.0])

ALL_VALID_T = torch.ones(3, dtype=torch.bool)


def router_of(config: RoutingConfig, num_experts: int = 4) -> Router:
    """A router whose logits are its input."""
    router = Router(num_experts, num_experts, config)
    router.weight.data.copy_(torch.eye(num_experts))
    return router.eval()


def golden_routing(config: RoutingConfig) -> Routing:
    """The decision for the golden logits."""
    return router_of(config)(LOGITS_TE, torch.ones(1, 3, dtype=torch.bool))
