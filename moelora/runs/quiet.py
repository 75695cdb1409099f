"""Keep other libraries' noise off the screen; imports nothing heavy, so that it comes before what it quiets."""

from __future__ import annotations

import logging
import warnings

# The logger and the message with which bitsandbytes, when it is imported, offers another package for a CPU kernel.
_KERNEL_LOGGER = "bitsandbytes.backends.cpu.ops"
_KERNEL_NOTICE = "Failed to load CPU gemm_4bit_forward"


def drop_kernel_notice() -> None:
    """Drop the one line that bitsandbytes prints when PEFT imports it; all else that it says stays.

    `import moelora` calls this before it imports PEFT: nobody who asked for an adapter can act on that line.
    """
    logging.getLogger(_KERNEL_LOGGER).addFilter(_is_no_kernel_notice)


def _is_no_kernel_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_KERNEL_NOTICE)


def quiet_libraries() -> None:
    """Turn off other bars (there is one, and it shows the run) and messages that nobody who runs this can act on."""
    # Where file times are coarse, checkpoints are ordered by their numbers, as they should be.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
    import datasets
    from transformers.utils.logging import disable_progress_bar

    datasets.disable_progress_bars()
    disable_progress_bar()
    # cellpylib, which reasoning-gym imports, compares texts with `is`.
    warnings.filterwarnings("ignore", category=SyntaxWarning)
    # peft 0.21 asks transformers 5.23 by the old name in every get_peft_model.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
