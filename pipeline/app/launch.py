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
    """Return whether only this machine reaches the address; raises CarvanaError if it is none."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        raise CarvanaError(
            f"--address {address} is no address: give one of this machine, such as {LOOPBACK}."
        ) from None


def check_port(address: str, port: int) -> None:
    """Raise CarvanaError unless a server can listen there now."""
    if not 0 < port < 1 << 16:
        raise CarvanaError(f"--port {port} is no port: they go from 1 to 65535.")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do, after an earlier one
        try:
            probe.bind((address, port))
        except OSError as error:
            raise CarvanaError(_why_not(error, address, port)) from None


def server_url(address: str, port: int) -> str:
    """Return what a browser is told."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def _why_not(error: OSError, address: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"Port {port} of {address} is taken, maybe by the same command elsewhere: choose one with --port."
    if error.errno == errno.EACCES:
        return f"Port {port} may not be used: choose one above 1023 with --port."
    return f"Port {port} of {address} can't be had ({error.strerror}): give this machine's own with --address."


PAGE = Path(__file__).with_name("main.py")
"""The script that Streamlit runs."""

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
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.app.launch", *streamlit_options(address, port, local)])


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


_PANELS = 200
"""Of a training, held in memory at most: of more epochs TensorBoard shows a part. Its own choice would be 10."""


def serve_tensorboard(address: str, port: int) -> None:
    """Serve ``runs/``; does not return.

    Raises CarvanaError where nothing was trained yet, and for an address or port that can't be had.
    """
    if not any(runs_dir().glob("**/events.out.tfevents.*")):
        raise CarvanaError(f"There is no log of a training in {runs_dir()}: train first, with 'dvc repro train'.")
    local = is_loopback(address)
    check_port(address, port)
    _start(address, port)
    print(f"TensorBoard is at {server_url(address, port)}, until Ctrl-C. It shows {runs_dir()}.", flush=True)
    if not local:
        print(f"warning: whoever reaches {address} can look: there is no password.", file=sys.stderr)
    threading.Event().wait()


def _start(address: str, port: int) -> None:
    """Serve in a thread."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resume
    board = program.TensorBoard(plugins=default.get_plugins())
    options = {
        "logdir": runs_dir(),
        "host": address,
        "port": port,
        "window_title": "Carvana",
        "samples_per_plugin": f"images={_PANELS}",
        "load_fast": "false",  # the other loader is a server of its own, spoken to over the network, proxies and all
    }
    board.configure(["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    try:
        board.launch()
    except program.TensorBoardServerException as error:
        raise CarvanaError(f"{error.msg}: choose another port with --port.") from error


def run_streamlit() -> None:
    """Run Streamlit with the options of this process, and leave at once when it stops; does not return."""
    os.environ["TQDM_DISABLE"] = "1"  # the page has bars of its own
    from streamlit import net_util
    from streamlit.web import cli

    net_util.get_external_ip = lambda: None  # else each foreign site that tries the page has it ask another host for it
    try:
        cli.main(["run", str(PAGE), *sys.argv[1:]], prog_name="carvana app")
    except SystemExit as end:
        # Nothing is left to be saved, and a library's thread that is at work would abort the usual way out.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


if __name__ == "__main__":
    run_streamlit()
