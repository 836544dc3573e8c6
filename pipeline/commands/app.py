"""``carvana app``: serve the page of ``pipeline/app`` with Streamlit until Ctrl-C."""

import errno
import ipaddress
import os
import socket
import sys
from importlib.util import find_spec
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.params import read_params

PAGE = Path(__file__).parents[1] / "app" / "main.py"

LOOPBACK = "127.0.0.1"
PORT = 8501

UPLOAD_MB = 32
"""Of one picture, at most: the competition's largest has 1 MB, a telephone's some 10."""


def serve(address: str = LOOPBACK, port: int = PORT) -> None:
    """Become the server of the page: does not return, and Ctrl-C or a signal stops it as it stops Streamlit.

    Raises PipelineError outside a project, without Streamlit, and for an address or port that can't be had.
    """
    read_params()
    if find_spec("streamlit") is None:
        raise PipelineError("The page needs Streamlit, which is not installed: pip install '.[app]'")
    local = _is_loopback(address)
    _demand_free(address, port)
    host = f"[{address}]" if ":" in address else address
    print(f"The page is at http://{host}:{port}, until Ctrl-C.")
    if not local:
        print(
            f"warning: whoever reaches {address} can use it: there is no password, and what is sent is not encrypted. "
            "Pictures of the project, its scores and its ledger are shown.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "streamlit", "run", str(PAGE), *options(address, port, local)])


def options(address: str, port: int, local: bool) -> list[str]:
    """Return Streamlit's options: all that matters, so that no file of settings in a home decides otherwise."""
    chosen = {
        "server.address": address,
        "server.port": port,
        "server.headless": "true",  # else it asks for an email address, and opens a browser
        "server.fileWatcherType": "none",
        "server.maxUploadSize": UPLOAD_MB,
        "server.enableXsrfProtection": "true",
        "server.enableCORS": "true",  # the protection, against its name
        "server.enableStaticServing": "false",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": "false",
        "logger.hideWelcomeMessage": "true",  # for a wildcard address it would ask another host for this one's own
        "theme.light.primaryColor": "#0067a8",
        "theme.dark.primaryColor": "#63b3ed",
    }
    # Against other sites that point their own names at this machine.
    hosts = [f"--server.allowedHosts={host}" for host in ("localhost", LOOPBACK, "::1")] if local else []
    return [*(f"--{name}={value}" for name, value in chosen.items()), *hosts]


def _is_loopback(address: str) -> bool:
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise PipelineError(
            f"--address {address} is no address: give one of this machine, such as {LOOPBACK}."
        ) from None


def _demand_free(address: str, port: int) -> None:
    """Raise PipelineError unless a server can listen there now."""
    if not 0 < port < 1 << 16:
        raise PipelineError(f"--port {port} is no port: they go from 1 to 65535.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does, after an earlier one
        try:
            probe.bind((address, port))
        except OSError as error:
            raise PipelineError(_why_not(error, address, port)) from None


def _why_not(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {address} is taken, maybe by another 'carvana app': choose one with --port."
    if error.errno == errno.EACCES:
        return f"Port {port} may not be used: choose one above 1023 with --port."
    return f"Port {port} of {address} can't be had ({error.strerror}): give this machine's own with --address."
