"""Credentials for Kaggle, from every place where its own client looks, in its order."""

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
    "make one at https://www.kaggle.com/settings ('Create New Token') and put it into the file ~/.kaggle/access_token "
    "or the variable KAGGLE_API_TOKEN (an older kaggle.json in ~/.kaggle, or 'kaggle auth login', does as well)"
)


class Bearer(AuthBase):
    """An access token."""

    def __init__(self, token: str) -> None:
        self._token = token

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the token to a request."""
        request.headers["Authorization"] = f"Bearer {self._token}"
        return request


Renew = Callable[[Path], str | None]
"""Return the access token that a file with an OAuth login stands for, renewed where that is needed."""


class Login(AuthBase):
    """An OAuth login, whose token is asked for, and renewed, when it is first needed."""

    def __init__(self, file: Path, renew: Renew) -> None:
        self._file = file
        self._renew = renew
        self.secrets: list[str] = []

    def __call__(self, request: PreparedRequest) -> PreparedRequest:
        """Add the token to a request; raises CarvanaError if there is none."""
        if not self.secrets or has_run_out(self._file):
            token = self._renew(self._file)
            if not token or not _is_plausible(token):
                raise CarvanaError(f"The login in {self._file} holds no token: run 'kaggle auth login' again.")
            self.secrets.append(token)
        return Bearer(self.secrets[-1])(request)


@dataclass(frozen=True)
class Credential:
    """One way to prove who one is."""

    source: str
    """Where it was found, in words."""

    auth: AuthBase = field(repr=False)
    """Adds it to a request."""

    secrets: Sequence[str] = field(repr=False)
    """What no message may hold."""


def find(renew: Renew) -> list[Credential]:
    """Return all credentials, the first being the one that Kaggle's client would use.

    What can't be one is passed, with a warning. Raises CarvanaError that says where was looked and how to get one, if
    there are none. Reads Kaggle's own files only, and makes no call.
    """
    faults: list[str] = []
    found = [*_token(faults), *_key(faults), *_login(renew)]
    if not found:
        reasons = "".join(f"; {words}" for words in faults)
        raise CarvanaError(
            "No credentials for Kaggle, neither in KAGGLE_API_TOKEN or KAGGLE_USERNAME and KAGGLE_KEY, "
            f"nor in {_config_folder()}{reasons}: {HOW_TO_GET_ONE}."
        )
    for words in faults:
        print(f"warning: {words}.", file=sys.stderr)
    return found


def _token(faults: list[str]) -> list[Credential]:
    try:
        token, source = get_access_token_from_env()
    except (OSError, UnicodeDecodeError) as error:
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:  # a token that it took for a path
            token, source = os.environ["KAGGLE_API_TOKEN"], "KAGGLE_API_TOKEN"
        else:
            faults.append(f"the file with Kaggle's access token can't be read, {_reason(error)}")
            return []
    if not token:
        return []
    source = "~/.kaggle/access_token" if source == "access_token" else str(source)
    token = token.strip()
    if source == "KAGGLE_API_TOKEN" and token[:1] in ("/", "~", "."):
        faults.append("KAGGLE_API_TOKEN names a file that is not there")
        return []
    if not _is_plausible(token):
        faults.append(f"what is in {source} can't be a credential, it has blanks or other odd signs")
        return []
    return [Credential(source, Bearer(token), (token,))]


def _key(faults: list[str]) -> list[Credential]:
    file = _config_folder() / "kaggle.json"
    stored = _read(file, faults)
    user = os.environ.get("KAGGLE_USERNAME") or stored.get("username")
    key = os.environ.get("KAGGLE_KEY") or stored.get("key")
    if not user or not key:
        return []
    source = "KAGGLE_USERNAME and KAGGLE_KEY" if os.environ.get("KAGGLE_KEY") else str(file)
    if source == str(file):
        _warn_if_open(file)
    name, secret = str(user).strip(), str(key).strip()
    if not _is_plausible(name) or not _is_plausible(secret):
        faults.append(f"what is in {source} can't be a credential, it has blanks or other odd signs")
        return []
    encoded = base64.b64encode(f"{name}:{secret}".encode()).decode()
    return [Credential(source, HTTPBasicAuth(name, secret), (secret, encoded))]


def _login(renew: Renew) -> list[Credential]:
    file = Path("~/.kaggle/credentials.json").expanduser()
    if not file.is_file():
        return []
    login = Login(file, renew)
    return [Credential(f"the login in {file}", login, login.secrets)]


def has_run_out(login: Path) -> bool:
    """Return whether an OAuth login's token is past its time, or within five minutes of it."""
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


def _read(file: Path, faults: list[str]) -> Mapping[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        faults.append(f"{file} can't be read, {_reason(error)}")
        return {}
    return content if isinstance(content, dict) else {}


def _is_plausible(value: str) -> bool:
    """Return whether a secret fits a header: one that does not would be shown whole in an error."""
    return bool(value) and value.isascii() and value.isprintable() and " " not in value


def _warn_if_open(file: Path) -> None:
    with contextlib.suppress(OSError):
        if os.name != "nt" and file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            print(
                f"warning: other users of this machine can read {file}: 'chmod 600 {file}' stops that.", file=sys.stderr
            )


def _reason(error: Exception) -> str:
    # A parser's message may quote what it read.
    return error.strerror or "" if isinstance(error, OSError) else "it is not a valid JSON"
