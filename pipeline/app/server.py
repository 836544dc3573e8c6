"""The process that ``carvana app`` becomes: Streamlit with the options given, left at once when it stops."""

import os
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("main.py")


def main() -> None:
    """Serve the page until a signal; does not return."""
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
    main()
