"""``carvana tensorboard``: serve the logs of all trainings until Ctrl-C."""

import socket
import threading

from tensorboard import default, program

from pipeline.errors import PipelineError
from pipeline.places import runs

_PANELS = 200
"""Of a training, held in memory at most, evenly spaced over its epochs; TensorBoard's own choice would be 10."""


def serve(address: str, port: int) -> None:
    """Serve ``runs/``; does not return.

    Raises PipelineError where nothing was trained yet, and for an address or port that can't be had.
    """
    url = start(address, port)
    print(f"TensorBoard is at {url}, until Ctrl-C. It shows {runs()}.", flush=True)
    threading.Event().wait()


def start(address: str, port: int) -> str:
    """Serve ``runs/`` in a thread and return the URL; raises PipelineError as ``serve`` does."""
    if not any(runs().glob("**/events.out.tfevents.*")):
        raise PipelineError(f"There is no log of a training in {runs()}: train first, with 'dvc repro train'.")
    if not 0 < port < 1 << 16:
        raise PipelineError(f"--port {port} is no port: they go from 1 to 65535.")
    board = program.TensorBoard(plugins=default.get_plugins())
    options = {
        "logdir": runs(),
        "host": address,
        "port": port,
        "window_title": "Carvana",
        "samples_per_plugin": f"images={_PANELS}",
        "load_fast": "false",  # the other loader is a server of its own, spoken to over the network, proxies and all
    }
    board.configure(["tensorboard", *(f"--{name}={value}" for name, value in options.items())])
    try:
        return str(board.launch())
    except program.TensorBoardPortInUseError as error:
        raise PipelineError(f"Port {port} is taken, maybe by another TensorBoard: choose one with --port.") from error
    except (program.TensorBoardServerException, socket.gaierror) as error:
        raise PipelineError(f"{address}, port {port}, can't be had ({error}): see --address and --port.") from error
