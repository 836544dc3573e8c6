"""Run the benchmarks: ``python -m benchmarks [NAME ...]``.

Each compares this pipeline with the usual way. They use Kaggle's images if those are there, else a synthetic sample.
"""

import argparse
import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

NAMES = ("rle", "reading", "ensemble", "ablation", "prediction", "cpu", "check")

_KAGGLE_DATA = Path(__file__).parents[2] / "shared" / "carvana"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare the speed of this pipeline with the usual ways."
    )
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)} (default: all these), or gpu"
    )
    parser.add_argument("--data", type=Path, help="folder with the competition's zips (default: a synthetic sample)")
    parser.add_argument("--out", type=Path, help="gpu only: write the figures to this JSON file too")
    parser.add_argument("--only", nargs="+", metavar="PART", default=(), help="gpu only: measure these parts")
    parser.add_argument("--tiny", action="store_true", help="run each once on few items, to test that it works")
    arguments = parser.parse_args()
    chosen = arguments.names or NAMES
    for name in chosen:
        if name not in (*NAMES, "gpu"):
            parser.error(f"unknown benchmark '{name}': choose from {', '.join(NAMES)}, gpu")
    if "gpu" in chosen:
        from benchmarks.bench_gpu import run_gpu

        with _data(arguments.data) as folder:
            run_gpu(folder, arguments.tiny, arguments.out, arguments.only)
        return
    # Imported here, so that the processes that measure peak memory import only what they run.
    from benchmarks.timing import Row, table

    rows: list[Row] = []
    with _data(arguments.data) as folder:
        for name in chosen:
            rows += importlib.import_module(f"benchmarks.bench_{name}").run(folder, arguments.tiny)
            print(f"{name} done", flush=True)
    print()
    print(table(rows))
    print(
        "\nTimes: median milliseconds per item. Ratio: theirs / ours, median and range over alternating rounds.\n"
        "Peak: growth of resident memory in the first call of a new process, including all libraries.\n"
        "RLE, reading and the ensemble run on one core, prediction on all cores: measure it on an idle machine,\n"
        "because torch's threads spin while they wait for each other. For cpu, times are those of the processor."
    )


@contextlib.contextmanager
def _data(given: Path | None) -> Iterator[Path]:
    found = given or _KAGGLE_DATA
    if given or found.is_dir():
        print(f"Data: Kaggle's images in {found}")
        yield found
        return
    from pipeline.config import SampleSettings
    from pipeline.synthetic.sample_competition import draw_sample

    with tempfile.TemporaryDirectory() as temporary:
        print("Data: a synthetic sample")
        draw_sample(Path(temporary), SampleSettings(train_cars=2, test_cars=1))
        yield Path(temporary)


if __name__ == "__main__":
    main()
