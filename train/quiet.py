"""Keep other libraries' noise off the screen; imports nothing heavy, so that it comes before what it quiets."""

from __future__ import annotations

import logging
import warnings


def quiet_libraries() -> None:
    """Turn off other bars (there is one, and it shows the run) and messages that nobody who runs this can act on."""
    # bitsandbytes, if installed, offers another package for CPU kernels when the next lines import it.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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
