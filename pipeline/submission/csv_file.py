"""Submission CSVs as files: read rows one by one, compress parts that join into one gzip file."""

import gzip
import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.competition.image_ids import parse_image_id
from pipeline.errors import CarvanaError

_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # deflate, no name, no time: the same rows, the same bytes
_END_OF_STREAM = b"\x03\x00"
_LEVEL = 6


def compress_part(text: bytes) -> bytes:
    """Return a part: raw deflate data that ends on a byte, so that parts can be joined, and starts afresh."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(text) + deflate.flush(zlib.Z_FULL_FLUSH)


def join_parts(parts: Iterable[Path], target: Path) -> None:
    """Write one gzip member from parts in order.

    One member, since some readers stop after the first; its checksum is why the parts are read through once more.
    """
    checksum, size = 0, 0
    with target.open("wb") as out:
        out.write(_HEADER)
        for part in parts:
            data = part.read_bytes()
            text = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data)
            checksum, size = zlib.crc32(text, checksum), size + len(text)
            out.write(data)
        out.write(_END_OF_STREAM + struct.pack("<II", checksum, size & 0xFFFFFFFF))


CSV_HEADER = "img,rle_mask"
"""First line of every submission, and of train_masks.csv."""


def read_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield ``(row, image_id, text)`` of each row of a CSV: its number, from 2, its image, its run-length code.

    The suffix says how the file is packed: ``.gz``, ``.zip`` (holding one CSV), or anything else for plain text.
    Raises CarvanaError if the file is absent or damaged, the header is another, or a row has other than two columns
    or a name that is no image's. The run-length code is not looked into.
    """
    stream = read_lines(path)
    _check_header(path, next(stream, b""))
    for row, line in enumerate(stream, start=2):
        image_id, text = _fields(path, row, line)
        yield row, image_id, text


def _check_header(path: Path, line: bytes) -> None:
    columns = line[:100].rstrip(b"\r\n").decode(errors="replace")
    if [_unquoted(column) for column in columns.split(",")] != CSV_HEADER.split(","):
        raise CarvanaError(f"{path}, row 1: the header is {columns!r}, expected {CSV_HEADER!r}.")


def _fields(path: Path, row: int, line: bytes) -> tuple[str, str]:
    """Return image id and run-length code of a line; the csv module takes ten times as long, for quotes alone."""
    fields = line.decode(errors="replace").rstrip("\r\n").split(",")
    if b'"' in line:
        fields = [_unquoted(field) for field in fields]
        if any('"' in field for field in fields):
            raise CarvanaError(f"{path}, row {row}: a quotation mark out of place; take it out.")
    if len(fields) != 2:
        raise CarvanaError(f"{path}, row {row}: {len(fields)} columns instead of 2, an image name and its mask.")
    name, text = fields
    image_id, _, suffix = name.partition(".")
    try:
        if suffix != "jpg":
            raise CarvanaError(f"'{name[:40]}' is no image name: expected '<image id>.jpg'.")
        parse_image_id(image_id)
    except CarvanaError as error:
        raise CarvanaError(f"{path}, row {row}: {error}") from None
    return image_id, text


def _unquoted(field: str) -> str:
    return field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field


def content_digest(path: Path, compression: str | None = None) -> str:
    """Return the hex SHA-256 of the CSV text, uncompressed; ``packed`` stands in for a suffix that does not tell."""
    digest = hashlib.sha256()
    for line in read_lines(path, compression):
        digest.update(line)
    return digest.hexdigest()


def read_lines(path: Path, compression: str | None = None) -> Iterator[bytes]:
    """Yield the lines of the CSV, with their ends, unpacked as the suffix says, or ``packed`` in its place."""
    try:
        with _opened(path, compression or path.suffix) as stream:
            yield from stream
    except FileNotFoundError:
        raise CarvanaError(f"{path} does not exist: expected a CSV, plain, .gz or .zip.") from None
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        # Besides what the disk may do: cut short or damaged archives, and zips that are encrypted or packed otherwise.
        raise CarvanaError(f"{path} can't be read, write or fetch it again: {error}") from error


@contextmanager
def _opened(path: Path, suffix: str) -> Iterator[Iterable[bytes]]:
    """Open the CSV for reading, unpacked as the suffix says."""
    if suffix == ".gz":
        with gzip.open(path) as stream:
            yield stream
    elif suffix == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_only_csv(path, archive)) as member:
            # The member would split lines too, at half the speed; it can be buffered, though its type doesn't say so.
            yield io.BufferedReader(member, buffer_size=1 << 20)  # type: ignore[type-var]
    else:
        with path.open("rb") as stream:
            yield stream


def _only_csv(path: Path, archive: zipfile.ZipFile) -> str:
    # macOS adds a shadow of each file under __MACOSX/.
    names = [name for name in archive.namelist() if name.endswith(".csv") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise CarvanaError(f"{path} holds {len(names)} CSVs: expected one.")
    return names[0]
