"""The errors moelora raises. Every message says what is wrong, the value, the allowed values and the likely fix."""

from __future__ import annotations


class MoeLoraError(ValueError):
    """Base of every error raised on purpose by moelora.

    A message is one line, whatever it quotes of a file. A traceback, and the line that a command prints, end with the
    place in the documentation that says more.

    Args:
        *args: The message.
        anchor: The heading about this very message; None takes that of its kind.
    """

    anchor: str = "troubleshooting"
    """The heading of docs/troubleshooting.md about errors of this kind, or about this one."""

    def __init__(self, *args: object, anchor: str | None = None) -> None:
        super().__init__(*(" ".join(arg.splitlines()) if isinstance(arg, str) else arg for arg in args))
        if anchor is not None:
            self.anchor = anchor
        self.add_note(self.see())

    def see(self) -> str:
        """Where to read on."""
        return f"See docs/troubleshooting.md#{self.anchor}"


class ConfigError(MoeLoraError):
    """A configuration value is unknown, out of range, or contradicts another one."""

    anchor = "configuration"


class TargetError(MoeLoraError):
    """No module of the base model fits the targets, or a targeted module has no form moelora can adapt."""

    anchor = "attaching-to-a-model"


class AdapterNameError(MoeLoraError):
    """An adapter name is unknown, already taken, or unusable as a folder or module name."""

    anchor = "names-of-adapters"


class MergeError(MoeLoraError, NotImplementedError):
    """Merging was asked for; a routed mixture depends on its input and cannot be folded into the base weights."""

    anchor = "merge"


class FormatVersionError(MoeLoraError):
    """An adapter was written in a format newer than this version of moelora can read."""

    anchor = "format-version"


class AdapterFileError(MoeLoraError):
    """The files of an adapter are missing, damaged, or hold what no adapter can."""

    anchor = "loading"


class RegistrationError(MoeLoraError):
    """PEFT's method tables already hold another package's MOELORA."""

    anchor = "registration"


class ComposeError(MoeLoraError):
    """LoRAs cannot be put together to a mixture, or its experts cannot be edited as asked for."""

    anchor = "composing-and-exporting"


class HubError(MoeLoraError):
    """An adapter could not be read from, or uploaded to, the Hugging Face Hub."""

    anchor = "the-hub"


class ReportError(MoeLoraError):
    """A folder holds nothing that a report could show, or what makes the page is not installed."""

    anchor = "reports"


class RunError(MoeLoraError):
    """A program cannot start what it was asked for, or cannot resume it."""

    anchor = "programs"


class TrainingError(MoeLoraError):
    """Training went wrong: its loss, a gradient or a weight is no number."""

    anchor = "training"


class ExportError(MoeLoraError):
    """An adapter cannot be exported: the target cannot express it, its base does not fit, or there is no place."""

    anchor = "composing-and-exporting"
