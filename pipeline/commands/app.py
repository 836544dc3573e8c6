"""``carvana app``: serve the page of ``pipeline/app`` with Streamlit until Ctrl-C."""

import os
import sys
from importlib.util import find_spec

from pipeline.commands.listening import LOOPBACK, check_port, is_loopback, server_url
from pipeline.errors import CarvanaError
from pipeline.params import read_params

UPLOAD_MB = 32
"""Of one picture, at most: the competition's largest has 1 MB, a telephone's some 10."""


def serve_app(address: str, port: int) -> None:
    """Become the server of the page: does not return, and Ctrl-C or a signal stops it as it stops Streamlit.

    Raises CarvanaError outside a project, without Streamlit, and for an address or port that can't be had.
    """
    read_params()
    if find_spec("streamlit") is None:
        raise CarvanaError("The page needs Streamlit, which is not installed: pip install '.[app]'")
    local = is_loopback(address)
    check_port(address, port)
    print(f"The page is at {server_url(address, port)}, until Ctrl-C.")
    if not local:
        print(
            f"warning: whoever reaches {address} can use it: there is no password, and what is sent is not encrypted. "
            "Pictures of the project, its scores and its ledger are shown.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.app.server", *streamlit_options(address, port, local)])


def streamlit_options(address: str, port: int, local: bool) -> list[str]:
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
        # As the report has them.
        "theme.light.primaryColor": "#0067a8",
        "theme.dark.primaryColor": "#63b3ed",
        "theme.dark.backgroundColor": "#14181e",
        "theme.dark.secondaryBackgroundColor": "#1c222a",
        "theme.dark.textColor": "#e4e8ee",
    }
    # Against other sites that point their own names at this machine.
    names = dict.fromkeys(("localhost", LOOPBACK, "::1", address)) if local else {}
    hosts = [f"--server.allowedHosts={host}" for host in names]
    return [*(f"--{name}={value}" for name, value in chosen.items()), *hosts]
