"""Start two data-parallel processes (gloo) of a test's program and get their results."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import prepare_multi_gpu_env

from tests import forked


def save_results(results: dict[str, Any], path: str) -> None:
    """Save what a process of two found, for `run_two_processes`, and end its group."""
    assert dist.get_world_size() == 2
    torch.save(results, f"{path}.{os.environ['RANK']}")
    dist.barrier()
    dist.destroy_process_group()


ACCELERATE_FSDP = [
    *("--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    *("--use_fsdp", "--fsdp_version", "2", "--fsdp_state_dict_type", "FULL_STATE_DICT"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
]


def accelerate_launch(words: Sequence[str]) -> dict[str, str]:
    """The environment that `accelerate launch` with these words gives to its processes."""
    return prepare_multi_gpu_env(launch_command_parser().parse_args([*words, "--main_process_port", "0", "script"]))


def run_two(module: str, *words: str, output: Path, environment: Mapping[str, str] | None = None) -> list[str]:
    """What the two processes of `torchrun --nproc_per_node 2 -m module words` print on standard output.

    Args:
        module: The program.
        *words: Its arguments.
        output: What they print goes to files beside it.
        environment: Of both; None is that of this process.
    """
    # as torchrun does, which would import torch once more: who starts the processes holds what they meet in
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    shared = {
        **(os.environ if environment is None else environment),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    files = [output.with_name(f"{output.name}.printed{rank}") for rank in (0, 1)]
    processes = [
        forked.start(module, *words, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output=file)
        for rank, file in enumerate(files)
    ]
    end = time.monotonic() + 900
    try:
        # where one fails the other waits for it in vain
        while any(each.is_alive() for each in processes) and not any(each.exitcode for each in processes):
            assert time.monotonic() < end, "it takes too long"
            time.sleep(0.05)
    finally:
        for each in processes:
            each.kill()
            each.join()
    said = "".join(Path(f"{file}.err").read_text()[-6000:] for file in files)
    assert [each.exitcode for each in processes] == [0, 0], said
    return [file.read_text() for file in files]


def run_two_processes(module: str, path: Path, environment: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """What the two processes of `python -m module path` saved in `path.0` and `path.1`."""
    run_two(module, str(path), output=path, environment=environment)
    return [torch.load(f"{path}.{rank}", weights_only=True) for rank in (0, 1)]
