"""`moelora export --to native-moe`."""

from __future__ import annotations

import argparse
from pathlib import Path


def export_native_moe(options: argparse.Namespace) -> None:
    """Write an adapter and its base as one native MoE, run both, and print what was found."""
    from moelora.export import check_export, to_native_moe
    from moelora.hub import read_adapter
    from moelora.runs.models import resolve_model
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    named = options.base or read_adapter(options.adapter).config.base_model_name_or_path
    base = resolve_model(named) if named else None
    moe = to_native_moe(
        options.adapter, options.output, base=base, dtype=options.dtype, max_shard_size=options.max_shard_size
    )
    files = f"{len(moe.files)} files" if len(moe.files) > 1 else "one file"
    rows = [
        ("architecture", moe.architecture),
        ("experts", f"{moe.num_experts} in each block, {moe.top_k} per token"),
        ("parameters", f"{moe.parameters:,} (the base has {moe.base_parameters:,})"),
        ("size", f"{moe.num_bytes:,} bytes in {files}, {moe.dtype}"),
    ]
    print(moe.folder)
    for name, value in rows:
        print(f"  {name:<14}{value}")
    for note in moe.notes:
        print(f"  note: {note}")
    print(f"  {'next':<14}transformers.AutoModelForCausalLM.from_pretrained({str(moe.folder)!r})    (needs no moelora)")
    if options.no_check:
        return
    needed, free = 9 * moe.parameters, _free_memory()
    if free is not None and needed > free:
        print(f"  not checked: that takes {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free")
        return
    assert base is not None
    found, flips = check_export(moe.folder, options.adapter, base)
    same = "the same" if found.same_greedy else "NOT the same"
    print(
        f"  {'check':<14}on {found.tokens} tokens in float32 logits differ by at most {found.logit_difference:.1e} "
        f"(the largest is {found.largest_logit:.1f}); greedy tokens are {same}"
    )
    print(
        f"  {'in bfloat16':<14}the native router chooses other experts than one in float32 on the same inputs for "
        f"{flips.router:.2%} of tokens and layers; against the adapter in float32 the native model does for "
        f"{flips.native:.2%}, the adapter in bfloat16 for {flips.adapter:.2%}"
    )


def _free_memory() -> int | None:
    """Bytes of memory that can be had, where the system says so (Linux)."""
    file = Path("/proc/meminfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
