"""Start the app or TensorBoard on a local port."""

import errno
import ipaddress
import logging
import os
import socket
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from tensorboard import default, program

from pipeline.config import read_params
from pipeline.errors import CarvanaError
from pipeline.workspace import runs_dir

LOOPBACK = "127.0.0.1"


def is_loopback(address: str) -> bool:
    """Return whether an address is reachable only from this machine; raises CarvanaError if it is invalid."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise CarvanaError(
            f"--address {address} is not an IP address. Use one of this machine, such as {LOOPBACK}."
        ) from None


def check_port(address: str, port: int) -> None:
    """Raise CarvanaError unless a server can listen on the port."""
    if not 0 < port < 1 << 16:
        raise CarvanaError(f"--port {port}: must be 1-65535.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, to restart without a wait
        try:
            probe.bind((address, port))
        except OSError as error:
            raise CarvanaError(_bind_error(error, address, port)) from None


def server_url(address: str, port: int) -> str:
    """Return the URL to open in a browser."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _bind_error(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {address} is in use, maybe by another instance. Choose one with --port."
    if error.errno == errno.EACCES:
        return f"No permission to use port {port}. Choose one above 1023 with --port."
    return f"Cannot use port {port} of {address} ({error.strerror}). Use an address of this machine with --address."


PAGE = Path(__file__).with_name("main.py")
"""The script that Streamlit runs."""

UPLOAD_MB = 32
"""Largest upload. The competition's images have up to 1 MB, photos from a phone about 10 MB."""


def serve_app(address: str, port: int) -> None:
    """Replace this process with the app's server; does not return. Ctrl-C stops it.

    Raises CarvanaError outside a project, without Streamlit, or if the address or port cannot be used.
    """
    read_params()
    if find_spec("streamlit") is None:
        raise CarvanaError("The app needs Streamlit, which is not installed. Run: pip install '.[app]'")
    local = is_loopback(address)
    check_port(address, port)
    print(f"The app runs at {server_url(address, port)}. Stop it with Ctrl-C.")
    if not local:
        print(
            f"warning: anyone who can reach {address} can use the app. There is no password and no encryption. It "
            "shows the project's images, scores and submission log.",
            file=sys.stderr,
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.app.launch", *streamlit_options(address, port, local)])


def streamlit_options(address: str, port: int, local: bool) -> list[str]:
    """Return Streamlit's options; all relevant ones are set, so that a user's Streamlit settings have no effect."""
    chosen = {
        "server.address": address,
        "server.port": port,
        "server.headless": "true",  # no prompt for an email address, and no browser window
        "server.fileWatcherType": "none",
        "server.maxUploadSize": UPLOAD_MB,
        "server.enableXsrfProtection": "true",
        "server.enableCORS": "true",  # despite its name, this turns the protection on
        "server.enableStaticServing": "false",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.showErrorLinks": "false",
        "client.toolbarMode": "minimal",
        "runner.magicEnabled": "false",
        "logger.hideWelcomeMessage": "true",  # for a wildcard address it would contact another host
        # The report's colors.
        "theme.light.primaryColor": "#0067a8",
        "theme.dark.primaryColor": "#63b3ed",
        "theme.dark.backgroundColor": "#14181e",
        "theme.dark.secondaryBackgroundColor": "#1c222a",
        "theme.dark.textColor": "#e4e8ee",
    }
    # Against DNS rebinding.
    names = dict.fromkeys(("localhost", LOOPBACK, "::1", address)) if local else {}
    hosts = [f"--server.allowedHosts={host}" for host in names]
    return [*(f"--{name}={value}" for name, value in chosen.items()), *hosts]


_MAX_IMAGES = 200
"""Prediction grids per run that TensorBoard keeps in memory; its default is 10. Of more epochs it shows a sample."""


def serve_tensorboard(address: str, port: int) -> None:
    """Serve the logs in ``runs/``; does not return.

    Raises CarvanaError if there are no logs, or if the address or port cannot be used.
    """
    if not any(runs_dir().glob("**/events.out.tfevents.*")):
        raise CarvanaError(f"No training logs in {runs_dir()}. Run 'dvc repro train' first.")
    local = is_loopback(address)
    check_port(address, port)
    _start(address, port)
    print(f"TensorBoard shows {runs_dir()} at {server_url(address, port)}. Stop it with Ctrl-C.", flush=True)
    if not local:
        print(f"warning: anyone who can reach {address} can see it. There is no password.", file=sys.stderr)
    threading.Event().wait()


def _start(address: str, port: int) -> None:
    """Start the server in a thread."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns about each resumed run
    board = program.TensorBoard(plugins=default.get_plugins())
    options = {
        "logdir": runs_dir(),
        "host": address,
        "port": port,
        "window_title": "Carvana",
        "samples_per_plugin": f"images={_MAX_IMAGES}",
        "load_fast": "false",  # the fast loader is a separate server, reached through the user's proxy settings
    }
    board.configure(["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    try:
        board.launch()
    except program.TensorBoardServerException as error:
        raise CarvanaError(f"{error.msg}. Choose another port with --port.") from error


def run_streamlit() -> None:
    """Run Streamlit with the arguments of this process, and exit immediately when it stops; does not return."""
    os.environ["TQDM_DISABLE"] = "1"  # the app shows its own progress bars
    from streamlit import net_util
    from streamlit.web import cli

    net_util.get_external_ip = lambda: None  # otherwise requests from foreign sites make it contact another host
    try:
        cli.main(["run", str(PAGE), *sys.argv[1:]], prog_name="carvana app")
    except SystemExit as end:
        # There is nothing to save, and a busy library thread would make a normal exit abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    run_streamlit()
