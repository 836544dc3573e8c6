"""``carvana tensorboard``: serve the logs of all trainings until Ctrl-C."""

import logging
import sys
import threading

from tensorboard import default, program

from pipeline.commands.listening import check_port, is_loopback, server_url
from pipeline.errors import CarvanaError
from pipeline.places import runs_dir

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
