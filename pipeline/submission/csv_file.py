"""Submission CSV files: read them row by row (plain, gzip or zip), and write them as one gzip file from parts."""

import codecs
import gzip
import hashlib
import io
import lzma
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Literal

from pipeline.competition.image_ids import parse_image_id
from pipeline.errors import CarvanaError

_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"  # no name and no time, so that equal rows give equal bytes
_END_OF_STREAM = b"\x03\x00"
_LEVEL = 6

ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, LookupError, RuntimeError, ValueError)
"""What zipfile raises for a corrupt zip."""


def compress_part(text: bytes) -> bytes:
    """Return ``text`` as raw deflate data that ends on a byte and refers to nothing before it, for ``join_parts``."""
    deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return deflate.compress(text) + deflate.flush(zlib.Z_FULL_FLUSH)


def join_parts(parts: Iterable[Path], target: Path) -> None:
    """Write the parts, in order, as a gzip file with one member.

    Some readers stop after the first member, so there must be only one. Its checksum needs the text of all parts, so
    every part is decompressed once.
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
"""First line of every submission and of train_masks.csv."""


def read_rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """Yield ``(row, image_id, text)`` for each row of a CSV: its number from 2, its image id, its run-length code.

    The file may be plain text, gzip, or a zip with one CSV inside; its content shows which. Raises CarvanaError if the
    file is missing or corrupt, the header is wrong, or a row does not have two columns or does not name an image. The
    run-length code is not checked.
    """
    stream = read_lines(path)
    check_header(path, next(stream, b""))
    for row, line in enumerate(stream, start=2):
        image_id, text = parse_line(path, row, line)
        yield row, image_id, text


def check_header(path: Path, line: bytes) -> None:
    """Raise CarvanaError unless the first line of a CSV is ``CSV_HEADER``."""
    columns = line[:100].rstrip(b"\r\n").decode(errors="replace")
    if [_unquote(column) for column in columns.split(",")] != CSV_HEADER.split(","):
        raise CarvanaError(f"{path}, row 1: the header is {columns!r}. Expected {CSV_HEADER!r}.")


def parse_line(path: Path, row: int, line: bytes) -> tuple[str, str]:
    """Return the image id and the run-length code in a line of a CSV.

    Raises CarvanaError, which names the file and the row, as ``read_rows`` does.
    """
    # The csv module takes ten times as long, and only quotation marks would need it.
    fields = line.decode(errors="replace").rstrip("\r\n").split(",")
    if b'"' in line:
        fields = [_unquote(field) for field in fields]
        if any('"' in field for field in fields):
            raise CarvanaError(f"{path}, row {row}: misplaced quotation mark. Remove it.")
    if len(fields) != 2:
        raise CarvanaError(f"{path}, row {row}: {len(fields)} columns. Expected 2, an image name and its mask.")
    name, text = fields
    image_id, _, suffix = name.partition(".")
    try:
        if suffix != "jpg":
            raise CarvanaError(f"'{name[:40]}' is not an image name. Expected '<image id>.jpg'.")
        parse_image_id(image_id)
    except CarvanaError as error:
        raise CarvanaError(f"{path}, row {row}: {error}") from None
    return image_id, text


def _unquote(field: str) -> str:
    return field[1:-1] if len(field) > 1 and field[0] == field[-1] == '"' else field


def content_digest(path: Path) -> str:
    """Return the hex SHA-256 of the lines that ``read_lines`` yields; raises its errors."""
    digest = hashlib.sha256()
    for line in read_lines(path):
        digest.update(line)
    return digest.hexdigest()


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the uncompressed lines of the CSV, line ends included, without a byte order mark.

    Raises CarvanaError if the file is missing or corrupt, or is not UTF-8 text with LF or CRLF after each line.
    """
    try:
        with _open_csv(path) as stream:
            lines = iter(stream)
            first = next(lines, b"")
            _check_text(path, first)
            yield without_bom(first)
            yield from lines
    except FileNotFoundError:
        raise CarvanaError(f"{path} not found. Expected a CSV, which may be gzipped or zipped.") from None
    except RuntimeError as error:  # a zip that is encrypted or uses an unknown compression
        raise CarvanaError(f"{path} cannot be read ({error}). Unpack it.") from error
    except (*ZIP_ERRORS, OSError) as error:
        raise CarvanaError(f"{path} cannot be read ({error}). Create or download it again.") from error


def _check_text(path: Path, line: bytes) -> None:
    """Raise CarvanaError if the first line of a file shows that it is not a CSV that can be read."""
    if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise CarvanaError(f"{path} is UTF-16 text. Save it as UTF-8.")
    if b"\0" in line[:100]:
        raise CarvanaError(f"{path} does not contain text. Expected a CSV, which may be gzipped or zipped once.")
    if b"\r" in line.rstrip(b"\r\n"):
        raise CarvanaError(f"{path} has line ends of old Macintosh files (CR). Save it with LF or CRLF.")


def without_bom(text: bytes) -> bytes:
    """Return UTF-8 text without the byte order mark that some spreadsheets write at its start."""
    return text.removeprefix(codecs.BOM_UTF8)


def compression_of(path: Path) -> Literal["gzip", "zip", "none"]:
    """Return how a file is compressed, which its first bytes show whatever its name; raises OSError."""
    with path.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zip" if start in (b"PK\x03\x04", b"PK\x05\x06") else "none"  # the second starts a zip without files


@contextmanager
def _open_csv(path: Path) -> Iterator[Iterable[bytes]]:
    compression = compression_of(path)
    if compression == "gzip":
        with gzip.open(path) as stream:
            yield stream
    elif compression == "zip":
        with zipfile.ZipFile(path) as archive, archive.open(_only_csv(path, archive)) as member:
            # A buffered reader splits lines twice as fast as the member itself; the member's type lacks what it needs.
            yield io.BufferedReader(member, buffer_size=1 << 20)  # type: ignore[type-var]
    else:
        with path.open("rb") as stream:
            yield stream


def _only_csv(path: Path, archive: zipfile.ZipFile) -> str:
    """Return the name of the only file in a zip, or of the only one that ends in ``.csv``; hidden files are skipped."""
    names = [member.filename for member in archive.infolist() if not member.is_dir()]
    files = [name for name in names if not PurePosixPath(name).name.startswith(".")]  # such as ._NAME, from macOS
    csvs = [name for name in files if name.lower().endswith(".csv")] or files
    if len(csvs) != 1:
        raise CarvanaError(f"{path} contains {len(files)} files. Expected one CSV file.")
    return csvs[0]
