"""``carvana tensorboard``: serve the logs of all trainings until Ctrl-C."""

import logging
import sys
import threading

from tensorboard import default, program

from pipeline.commands.listening import demand_free, is_loopback, url_of
from pipeline.errors import PipelineError
from pipeline.places import runs

_PANELS = 200
"""Of a training, held in memory at most: of more epochs TensorBoard shows a part. Its own choice would be 10."""


def serve(address: str, port: int) -> None:
    """Serve ``runs/``; does not return.

    Raises PipelineError where nothing was trained yet, and for an address or port that can't be had.
    """
    if not any(runs().glob("**/events.out.tfevents.*")):
        raise PipelineError(f"There is no log of a training in {runs()}: train first, with 'dvc repro train'.")
    local = is_loopback(address)
    demand_free(address, port)
    _start(address, port)
    print(f"TensorBoard is at {url_of(address, port)}, until Ctrl-C. It shows {runs()}.", flush=True)
    if not local:
        print(f"warning: whoever reaches {address} can look: there is no password.", file=sys.stderr)
    threading.Event().wait()


def _start(address: str, port: int) -> None:
    """Serve in a thread."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of each resume
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
        board.launch()
    except program.TensorBoardServerException as error:
        raise PipelineError(f"{error.msg}: choose another port with --port.") from error
