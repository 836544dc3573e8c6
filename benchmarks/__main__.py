"""`python -m benchmarks`, or with names of some: ratios measured in one run, on real cars where they are there."""

import argparse
import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAMES = ("rle", "reading", "ensemble", "ablation", "prediction", "check")

_REAL = Path(__file__).parents[2] / "shared" / "carvana"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Time this pipeline against the usual ways."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all where none is given")
    parser.add_argument("--tiny", action="store_true", help="run each once on few items: does it still work?")
    arguments = parser.parse_args()
    chosen = arguments.names or NAMES
    for name in chosen:
        if name not in NAMES:
            parser.error(f"there is no benchmark '{name}': choose from {', '.join(NAMES)}")
    # Imported here, so that the processes in which peaks are measured import only what they run.
    from benchmarks.timing import Row, table

    rows: list[Row] = []
    with _data() as folder:
        for name in chosen:
            rows += importlib.import_module(f"benchmarks.bench_{name}").run(folder, arguments.tiny)
            print(f"{name} done", flush=True)
    print()
    print(table(rows))
    print(
        "\nMilliseconds an image (medians); ratio: median of theirs / ours over rounds in turns, and its range.\n"
        "Peak: growth of a new process's resident memory in its first call, all libraries' allocations counted.\n"
        "RLE, reading and the ensemble run on one core each, prediction on all that torch takes:\n"
        "its ratios mean little while others use the cores, since torch's threads spin as they wait for each other."
    )


@contextlib.contextmanager
def _data() -> Iterator[Path]:
    if _REAL.is_dir():
        print(f"On real cars: {_REAL.resolve()}")
        yield _REAL
        return
    from pipeline.config import SampleSettings
    from pipeline.synthetic.sample_competition import draw_sample

    with tempfile.TemporaryDirectory() as temporary:
        print("On drawn cars")
        draw_sample(Path(temporary), SampleSettings(train_cars=2, test_cars=1))
        yield Path(temporary)


if __name__ == "__main__":
    main()
