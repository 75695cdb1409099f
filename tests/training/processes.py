"""Start two data-parallel processes (gloo) of a test's program and get their results."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def save_results(results: dict[str, Any], path: str) -> None:
    """Save what a process of two found, for `run_two_processes`, and end its group."""
    assert dist.get_world_size() == 2
    torch.save(results, f"{path}.{os.environ['RANK']}")
    dist.barrier()
    dist.destroy_process_group()


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE_FSDP = [
    *("accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"),
    *("--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
]


def run_two_processes(
    module: str, path: Path, timeout: float = 300, launcher: Sequence[str] = TORCHRUN
) -> list[dict[str, Any]]:
    """What the two processes of `python -m module path` saved in `path.0` and `path.1`."""
    command = [
        sys.executable,
        "-m",
        *launcher,
        "--main_process_port" if "accelerate" in launcher[0] else "--master_port",
    ]
    command.append(str(free_port()))
    done = subprocess.run(
        [*command, "-m", module, str(path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in (0, 1)]
