"""What is known of the cars themselves: metadata.csv, of which the report needs the makes."""

import csv
import io
from pathlib import Path

from pipeline.data.archive import open_archive
from pipeline.errors import CarvanaError

METADATA_FILE = "metadata.csv"


def read_car_makes(directory: Path) -> dict[str, str]:
    """Return the make of every car that metadata.csv names one of; empty where the competition's file is not there.

    Raises CarvanaError if the file is none of the competition's.
    """
    archive = open_archive(directory, METADATA_FILE)
    if archive is None:
        return {}
    rows = csv.DictReader(io.StringIO(archive.read(METADATA_FILE).decode("utf-8", "replace")))
    if not {"id", "make"} <= set(rows.fieldnames or ()):
        raise CarvanaError(f"{METADATA_FILE} in {archive.path} has no columns id and make: fetch it again.")
    return {row["id"]: row["make"].strip() for row in rows if row["id"] and row["make"] and row["make"].strip()}
