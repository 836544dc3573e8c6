"""Find Kaggle credentials, in the same places and order as Kaggle's own client."""

import base64
import contextlib
import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from kagglesdk.kaggle_env import get_access_token_from_env
from requests import PreparedRequest
from requests.auth import AuthBase, HTTPBasicAuth

from pipeline.errors import CarvanaError

HOW_TO_GET_ONE = (
    "create a token at https://www.kaggle.com/settings ('Create New Token') and put it into the file "
    "~/.kaggle/access_token or the variable KAGGLE_API_TOKEN (~/.kaggle/kaggle.json and 'kaggle auth login' also work)"
)


class Bearer(AuthBase):
    """Authentication with an access token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the token to a request."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


Renew = Callable[[Path], str | None]
"""Returns the access token of an OAuth login file, refreshed if necessary."""


class Login(AuthBase):
    """Authentication with an OAuth login, whose token is fetched and refreshed when it is needed."""

    def __init__(self, file: Path, renew: Renew) -> None:
        self._file = file
        self._renew = renew
        self.secrets: list[str] = []

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the token to a request; raises CarvanaError if there is no valid one."""
        if not self.secrets or is_expired(self._file):
            token = self._renew(self._file)
            if not token or not _is_plausible(token):
                raise CarvanaError(f"The login in {self._file} has no valid token. Run 'kaggle auth login' again.")
            self.secrets.append(token)
        return Bearer(self.secrets[-1])(request)


@dataclass(frozen=True)
class Credential:
    """Credentials, and where they come from."""

    source: str
    """For messages."""

    auth: AuthBase = field(repr=False)
    """Adds the credentials to a request."""

    secrets: Sequence[str] = field(repr=False)
    """Strings that must not appear in messages."""


def find(renew: Renew) -> list[Credential]:
    """Return all credentials, in the order of Kaggle's client.

    Invalid ones are skipped with a warning. Raises CarvanaError, saying how to get credentials, if there are none.
    Reads only Kaggle's own files and variables, and makes no request.
    """
    problems: list[str] = []
    found = [*_token(problems), *_key(problems), *_login(renew)]
    if not found:
        reasons = "".join(f"; {problem}" for problem in problems)
        raise CarvanaError(
            "No Kaggle credentials in KAGGLE_API_TOKEN, KAGGLE_USERNAME and KAGGLE_KEY, or "
            f"{_config_folder()}{reasons}: {HOW_TO_GET_ONE}."
        )
    for problem in problems:
        print(f"warning: {problem}.", file=sys.stderr)
    return found


def _token(problems: list[str]) -> list[Credential]:
    try:
        token, source = get_access_token_from_env()
    except (OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:  # Kaggle's client mistook a token for a path
            token, source = os.environ["KAGGLE_API_TOKEN"], "KAGGLE_API_TOKEN"
        else:
            problems.append(f"cannot read the file with Kaggle's access token ({_reason(error)})")
            return []
    if not token:
        names = [f"~/.kaggle/{name}" for name in ("access_token", "access_token.txt")]
        problems.extend(f"{name} is empty" for name in names if Path(name).expanduser().is_file())
        return []
    source = "~/.kaggle/access_token" if source == "access_token" else str(source)
    token = token.strip()
    if source == "KAGGLE_API_TOKEN" and token[:1] in ("/", "~", "."):
        problems.append("KAGGLE_API_TOKEN is the path of a missing file")
        return []
    if not _is_plausible(token):
        problems.append(f"{source} {_why_implausible(token)}")
        return []
    return [Credential(source, Bearer(token), (token,))]


def _key(problems: list[str]) -> list[Credential]:
    file = _config_folder() / "kaggle.json"
    stored = _read(file, problems)
    user = os.environ.get("KAGGLE_USERNAME") or stored.get("username")
    key = os.environ.get("KAGGLE_KEY") or stored.get("key")
    if not user or not key:
        if user or key:
            problems.append(
                f"the {'key' if user else 'username'} is missing (KAGGLE_USERNAME and KAGGLE_KEY, or {file})"
            )
        return []
    source = "KAGGLE_USERNAME and KAGGLE_KEY" if os.environ.get("KAGGLE_KEY") else str(file)
    if source == str(file):
        _warn_if_open(file)
    name, secret = str(user).strip(), str(key).strip()
    if not _is_plausible(name) or not _is_plausible(secret):
        problems.append(f"{source} {_why_implausible(secret if _is_plausible(name) else name)}")
        return []
    encoded = base64.b64encode(f"{name}:{secret}".encode()).decode()
    return [Credential(source, HTTPBasicAuth(name, secret), (secret, encoded))]


def _login(renew: Renew) -> list[Credential]:
    file = Path("~/.kaggle/credentials.json").expanduser()
    if not file.is_file():
        return []
    login = Login(file, renew)
    return [Credential(f"the login in {file}", login, login.secrets)]


def is_expired(login: Path) -> bool:
    """Return whether an OAuth login's token has expired, or will within five minutes."""
    try:
        ends = datetime.fromisoformat(json.loads(login.read_text(encoding="utf-8"))["access_token_expiration"])
        return ends < datetime.now(ends.tzinfo) + timedelta(minutes=5)
    except (OSError, ValueError, KeyError, TypeError):
        return True


def _config_folder() -> Path:
    """Return the folder of kaggle.json, as Kaggle's client chooses it."""
    chosen = os.environ.get("KAGGLE_CONFIG_DIR")
    if chosen:
        return Path(chosen)
    classic = Path("~/.kaggle").expanduser()
    if sys.platform.startswith("linux") and not classic.exists():
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser()) / "kaggle"
    return classic


def _read(file: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        problems.append(f"cannot read {file} ({_reason(error)})")
        return {}
    if not isinstance(content, dict) or not {"username", "key"} & content.keys():
        problems.append(f"{file} has no username and key")
        return {}
    return content


def _is_plausible(value: str) -> bool:
    """Return whether a secret is valid in a header; requests would show an invalid one in its error message."""
    return bool(value) and value.isascii() and value.isprintable() and not set(" \"'") & set(value)


def _why_implausible(value: str) -> str:
    if value[:1] in "\"'":
        return "has quotation marks around it, or is empty. Remove them"
    return "has invalid characters, such as spaces"


def _warn_if_open(file: Path) -> None:
    with contextlib.suppress(OSError):
        if os.name != "nt" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            print(f"warning: other users of this machine can read {file}. Run 'chmod 600 {file}'.", file=sys.stderr)


def _reason(error: Exception) -> str:
    # Not the parser's message, which may quote the content.
    if isinstance(error, OSError):
        return error.strerror or ""
    return "not UTF-8 text; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else "not valid JSON"
