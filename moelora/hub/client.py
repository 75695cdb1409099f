"""The errors of the Hub's client, said as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants, errors

from moelora.errors import HubError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


@contextmanager
def hub_errors(repo_id: str, action: str) -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError that says the cause and the fix.

    Args:
        repo_id: The repository in question.
        action: "read" or "write".
    """
    where = f"{action} {repo_id!r} on {constants.ENDPOINT}"
    try:
        yield
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository name: {error}. Give it as 'owner/name'.") from error
    except errors.GatedRepoError as error:
        raise HubError(f"cannot {where}: access to it is gated. Ask for access on its page, then log in.") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"cannot {where}: there is no such repository, or it is private and the token does not open it. Check the "
            "name; log in with `hf auth login` or pass token=."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"cannot {where}: it has no such branch, tag or commit. {error.server_message or ''}") from error
    except errors.RemoteEntryNotFoundError as error:
        raise HubError(
            f"cannot {where}: it has no {CONFIG_FILE} and {WEIGHTS_FILE}, so it is not an adapter."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"cannot {where}: there is no token. Log in with `hf auth login` or pass token=.") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"cannot {where}: {_cause_of(error)}") from error
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise HubError(f"cannot {where}: no connection ({error}). Is HF_HUB_OFFLINE set?") from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # the client's own base, whichever library it uses
        raise HubError(f"cannot {where}: no connection ({error}). Check the network and HF_ENDPOINT.") from error
    except RuntimeError as error:
        # the client wraps what stops the upload of a file of weights
        cause = error.__cause__
        if not isinstance(cause, (errors.HfHubHTTPError, errors.HTTPError)):  # type: ignore[attr-defined]
            raise
        with hub_errors(repo_id, action):
            raise cause from cause.__cause__


def _cause_of(error: errors.HfHubHTTPError) -> str:
    said = error.server_message or str(error)
    match error.response.status_code:
        case 401:
            return (
                f"the token was refused ({said}). Make one with write permission and `hf auth login`, or pass token=."
            )
        case 403:
            return f"the token may not do that ({said}). It needs write permission for that owner's repositories."
        case status:
            return f"the Hub answered {status} ({said})."
