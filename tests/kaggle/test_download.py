"""Downloads by the real client from Kaggle on loopback, with every fault that it has."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import DataSettings
from pipeline.errors import CarvanaError
from pipeline.kaggle import download_cache, downloader, transfer
from pipeline.kaggle.api_errors import parse_retry_after
from pipeline.kaggle.client import KaggleClient
from pipeline.kaggle.commands import download_competition, preview_competition
from tests.fakes import fake_kaggle as faulty
from tests.fakes.fake_kaggle import (
    COMPETITION,
    FROM_KAGGLE,
    QUICK,
    TOKEN,
    Fault,
    KaggleServer,
    demand_nothing_secret,
)


def zipped(name: str, size: int) -> bytes:
    """A zip of a few members that don't shrink."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for number in range(4):
            body = np.random.default_rng(size + number).bytes(size // 4)
            archive.writestr(zipfile.ZipInfo(f"{name}/{number}.jpg"), body)
    return file.getvalue()


FILES = {
    "train.zip": zipped("train", 900_000),
    "test.zip": zipped("test", 500_000),
    "train_hq.zip": zipped("train_hq", 9_000),
    "test_hq.zip": zipped("test_hq", 7_000),
    "train_masks.zip": zipped("train_masks", 5_000),
    "train_masks.csv.zip": zipped("train_masks.csv", 20_000),
    "metadata.csv.zip": zipped("metadata.csv", 3_000),
    "sample_submission.csv.zip": zipped("sample_submission.csv", 2_000),
}
WANTED = ["train.zip", "test.zip", "train_masks.csv.zip", "metadata.csv.zip", "sample_submission.csv.zip"]


@pytest.fixture
def server() -> KaggleServer:
    return KaggleServer(FILES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / COMPETITION


def demand_whole(folder: Path, server: KaggleServer, wanted: list[str] = WANTED) -> None:
    """Every file is there, with its bytes, noted, and nothing else is."""
    names = {path.name for path in folder.iterdir() if path.suffix != ".bak"}
    assert names == {*wanted, "download_manifest.json"}
    for name in wanted:
        assert (folder / name).read_bytes() == server.files[name], name
    manifest = json.loads((folder / "download_manifest.json").read_text())
    assert {entry["file"] for entry in manifest.values()} == set(wanted)


@pytest.mark.usefixtures("kaggle")
class TestFetch:
    def test_only_required_files_are_downloaded(
        self, server: KaggleServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("ListDataFiles") == 4  # 8 files in pages of 2
        assert server.count("GET") == len(WANTED)
        told = capsys.readouterr()
        assert "train.zip" in told.out
        demand_nothing_secret(told.out + told.err + (folder / "download_manifest.json").read_text())

    def test_the_hq_photographs(self, server: KaggleServer, folder: Path, tmp_path: Path) -> None:
        download_competition(DataSettings(source="kaggle", quality="hq"), tmp_path, policy=QUICK)
        demand_whole(folder, server, ["train_hq.zip", "test_hq.zip", *WANTED[2:]])

    def test_the_next_run_asks_nothing(self, server: KaggleServer, tmp_path: Path) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        server.asked.clear()
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        download_competition(FROM_KAGGLE, tmp_path, thorough=True, policy=QUICK)
        assert server.asked == []

    @pytest.mark.parametrize("thorough", [True, False])
    def test_a_file_that_changed_here_is_fetched_anew(
        self, server: KaggleServer, folder: Path, tmp_path: Path, thorough: bool
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        file = folder / "test.zip"
        stat, body = file.stat(), bytearray(file.read_bytes())
        body[len(body) // 2] ^= 1
        file.write_bytes(body)
        if thorough:  # rot, which no time tells
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        download_competition(FROM_KAGGLE, tmp_path, thorough=thorough, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("GET") == len(WANTED) + 1

    def test_names_without_zip(self, server: KaggleServer, folder: Path, tmp_path: Path) -> None:
        """The list decides; what is a zip gets the name of one, and a plain table stays one."""
        for name in WANTED:
            server.files[name.removesuffix(".zip")] = server.files.pop(name)
        server.files["sample_submission.csv"] = b"img,rle_mask\n00087a6bd4dc_01.jpg,\n"
        server.files["metadata.csv"] = b"id,year\n"
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        names = {path.name for path in folder.iterdir()}
        assert names == {"train.zip", "test.zip", "train_masks.csv.zip", "metadata.csv", "sample_submission.csv"} | {
            "download_manifest.json"
        }
        assert (folder / "train.zip").read_bytes() == FILES["train.zip"]
        assert (folder / "metadata.csv").read_bytes() == b"id,year\n"
        server.asked.clear()
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert server.asked == []

    def test_a_file_that_is_not_listed(self, server: KaggleServer, tmp_path: Path) -> None:
        del server.files["train.zip"]
        with pytest.raises(CarvanaError, match=r"train\.zip.*data\.competition"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)

    def test_a_disk_without_room(self, server: KaggleServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        usage = downloader.shutil.disk_usage(tmp_path)._replace(free=1_000_000 + (64 << 20))
        monkeypatch.setattr(downloader.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(CarvanaError, match=r"1\.4 MB.*68\.1 MB"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert server.count("DownloadDataFile") == 0

    def test_files_that_lie_there_already_are_taken_if_sound(
        self, server: KaggleServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """By hand, or of a run that was killed before it noted them; one of the right size may be damaged."""
        folder.mkdir(parents=True)
        (folder / "train.zip").write_bytes(FILES["train.zip"])
        damaged = bytearray(FILES["test.zip"])
        damaged[1000] ^= 1
        (folder / "test.zip").write_bytes(damaged)
        (folder / "metadata.csv.zip").write_bytes(FILES["metadata.csv.zip"][:-50])
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("GET") == len(WANTED) - 1
        told = capsys.readouterr()
        assert "train.zip" in told.out
        assert "test.zip already exists; renamed to test.zip." in told.err
        asides = {path.name.split(".zip.")[0]: path.read_bytes() for path in folder.glob("*.bak")}
        assert asides == {"test": bytes(damaged), "metadata.csv": FILES["metadata.csv.zip"][:-50]}

    def test_zip_members_outside_the_folder_are_refused(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../../outside.jpg", b"x")
        server.files["train.zip"] = file.getvalue()
        with pytest.raises(CarvanaError, match=r"\.\./\.\./outside\.jpg"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert not (folder / "train.zip").exists()
        assert not list(tmp_path.rglob("outside.jpg"))

    def test_unreadable_download_manifest(self, folder: Path, tmp_path: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "download_manifest.json").write_text('{"train": {}}')
        with pytest.raises(CarvanaError, match=r"download_manifest\.json"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)

    def test_a_file_that_changed_at_kaggle_is_told_and_not_mixed(
        self, server: KaggleServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        server.version = "2"
        (folder / "test.zip").unlink()
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        err = capsys.readouterr().err
        for name in WANTED:
            assert f"{name} changed on Kaggle" in err
        assert err.count("To download the new version, delete") == len(WANTED) - 1  # one is gone
        demand_whole(folder, server)


FAULTS: dict[str, tuple[str, list[Fault]]] = {
    "a call answers 500 thrice": ("ListDataFiles", [faulty.status(500)] * 3),
    "a call answers 503 as a page": ("DownloadDataFile", [faulty.page(503)]),
    "a call is asked too often": ("ListDataFiles", [faulty.status(429, "slow down", {"Retry-After": "0"})]),
    "a call's connection is reset": ("ListDataFiles", [faulty.reset] * 2),
    "a call's answer is lost": ("DownloadDataFile", [faulty.lose]),
    "a call's answer never comes": ("ListDataFiles", [faulty.hang]),
    "a call's answer is no JSON": (
        "ListDataFiles",
        [lambda handler, make: faulty.Answer(200, b"{", {"Content-Type": "application/json"})],
    ),
    "the first byte never comes": ("GET", [faulty.hang]),
    "the download drops": ("GET", [faulty.cut(300_000)]),
    "it drops before the first byte": ("GET", [faulty.cut(0)] * 3),
    "it drops more often than there are tries": ("GET", [faulty.cut(50_000)] * 12),
    "it drops and the address has expired": ("GET", [faulty.cut(300_000), faulty.expire]),
    "the address has expired at once": ("GET", [faulty.expire]),
    "the storage answers 500": ("GET", [faulty.page(500)]),
    "the storage answers 429": ("GET", [faulty.status(429, "", {"Retry-After": "0"})]),
    "a page of a proxy in place of the file": ("GET", [faulty.page(200)]),
    "it drops, and a page comes in place of the rest": ("GET", [faulty.cut(300_000), faulty.page(200)]),
    "it comes packed, as was not asked for": (
        "GET",
        [lambda handler, make: faulty.replace(make(), headers={"Content-Encoding": "gzip"})],
    ),
    "a wrong byte at the right size": ("GET", [faulty.spoil]),
    "a wrong byte, and no MD5": ("GET", [faulty.both(faulty.spoil, faulty.without("x-goog-hash"))]),
    "no length, and truncated": ("GET", [faulty.end_quietly(300_000)]),
    "no length and no ETag, and truncated": (
        "GET",
        [faulty.both(faulty.end_quietly(300_000), faulty.without("ETag", "x-goog-hash"))],
    ),
    "it drops, and the rest has a wrong byte": ("GET", [faulty.cut(300_000), faulty.spoil]),
    "the other part comes": (
        "GET",
        [
            faulty.cut(300_000),
            lambda handler, make: faulty.replace(make(), headers={"Content-Range": "bytes 5-9/900000"}),
        ],
    ),
}


def stop_at_the_end(home: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Fetch, and stop when all bytes of the first file came and are to be verified."""

    def stop(file: Path) -> None:
        raise error

    with monkeypatch.context() as stopping, pytest.raises(type(error)):
        stopping.setattr(transfer, "check_zip", stop)
        download_competition(FROM_KAGGLE, home, policy=QUICK)


PLAIN: dict[str, list[Fault]] = {
    "a wrong byte at the right size": [faulty.spoil],
    "one of another length, without MD5": [lambda handler, make: faulty.Answer(200, b"<html>log in</html>")],
    "a drop, and nothing that tells the version": [
        faulty.both(faulty.cut(10), faulty.without("ETag", "x-goog-hash")),
    ],
    "no length, and truncated": [faulty.end_quietly(10)],
}

FOREVER: dict[str, tuple[Fault, ...]] = {
    "ranges are ignored, and it drops": (faulty.drop_anew(100_000), faulty.drop_anew(200_000)),
    "parts come that are not named": (faulty.cut(300_000), faulty.without("Content-Range")),
    "a page for browsers": (faulty.page(200),),
    "no MD5 and always damaged": (faulty.both(faulty.spoil, faulty.without("x-goog-hash")),),
}


@pytest.mark.slow
@pytest.mark.usefixtures("kaggle")
class TestFaults:
    @pytest.mark.parametrize("name", PLAIN)
    def test_files_that_are_no_zips(self, server: KaggleServer, folder: Path, tmp_path: Path, name: str) -> None:
        """Nothing in them tells whether they are sound: the listed length, the MD5 and the version do."""
        del server.files["metadata.csv.zip"]
        server.files["metadata.csv"] = b"id,year\n00087a6bd4dc,2013-14\n"
        server.fail("GET", *[lambda handler, make: make()] * 3, *PLAIN[name])
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert not server.faults["GET"], "the fault never came"
        demand_whole(folder, server, [*WANTED[:3], "metadata.csv", WANTED[4]])

    @pytest.mark.parametrize("name", FOREVER)
    def test_endless_faults_end_with_an_error(self, server: KaggleServer, tmp_path: Path, name: str) -> None:
        server.fail("GET", *FOREVER[name] * 100)
        with pytest.raises(CarvanaError, match=r"train\.zip"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert server.count("GET") < 20

    def test_a_length_that_is_listed_wrong_does_no_harm(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        """Such as the length before zipping; the zip itself tells where it ends."""
        server.listed_sizes["train.zip"] = 2_000_000
        server.fail("GET", faulty.end_quietly(10_000_000))
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)

    def test_refused_downloads_are_not_kept(self, server: KaggleServer, folder: Path, tmp_path: Path) -> None:
        """So that the next run fetches what Kaggle has put in its place."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("../outside.jpg", b"x")
        server.files["train.zip"] = file.getvalue()
        with pytest.raises(CarvanaError, match=r"outside\.jpg"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        server.files["train.zip"] = FILES["train.zip"]
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)

    def test_names_that_would_steer_a_terminal_are_refused(self, server: KaggleServer, tmp_path: Path) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("\x1b[31m.jpg", b"x")
        server.files["train.zip"] = file.getvalue()
        with pytest.raises(CarvanaError, match="control characters") as caught:
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert "\x1b" not in str(caught.value)

    def test_a_file_of_another_version_than_listed_is_not_taken_for_it(
        self, server: KaggleServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All bytes came, and then a kill; meanwhile Kaggle has another file of the same length."""
        stop_at_the_end(tmp_path, monkeypatch, KeyboardInterrupt())
        server.files["train.zip"], server.version = zipped("other", 900_000), "2"
        assert len(server.files["train.zip"]) == len(FILES["train.zip"])
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)

    def test_all_bytes_came_before_a_kill(
        self, server: KaggleServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at_the_end(tmp_path, monkeypatch, KeyboardInterrupt())
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("GET") == len(WANTED)

    def test_a_storage_that_leads_elsewhere_gets_no_password(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        netrc = Path.home() / ".netrc"
        netrc.write_text("default login me password secret\n")
        netrc.chmod(0o600)

        def lead(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
            return faulty.Answer(302, b"", {"Location": handler.path.replace("storage.test", "elsewhere.test")})

        server.fail("GET", lead)
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)  # the server asserts that no credentials come
        demand_whole(folder, server)

    def test_what_was_fetched_is_not_overruled_by_what_lies_there(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        (folder / "test.zip").write_bytes(mine := zipped("more", 500_000))
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert [path.read_bytes() for path in folder.glob("*.bak")] == [mine]

    def test_a_newer_version_that_somebody_put_there_is_taken(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        server.files["test.zip"], server.version = zipped("test", 600_000), "2"
        (folder / "test.zip").write_bytes(server.files["test.zip"])
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("GET") == len(WANTED)

    def test_a_drive_that_fails_at_the_end_costs_nothing(
        self, server: KaggleServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        error = CarvanaError("see that its drive is there")
        error.__cause__ = OSError(5, "Input/output error")
        stop_at_the_end(tmp_path, monkeypatch, error)
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.count("GET") == len(WANTED)

    def test_an_old_form_of_a_file_is_moved_out_of_the_way(
        self, server: KaggleServer, folder: Path, tmp_path: Path
    ) -> None:
        (folder / "metadata.csv").mkdir(parents=True)
        (folder / "sample_submission.csv").write_text("img,rle_mask\n")
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert len(list(folder.glob("*.bak"))) == 2

    def test_a_file_that_was_only_touched_is_read_once(
        self, server: KaggleServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        (folder / "test.zip").touch()
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        monkeypatch.setattr(download_cache, "md5_digest", lambda file: pytest.fail("read again"))
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)

    @pytest.mark.parametrize("name", FAULTS)
    def test_ends_with_the_right_bytes(
        self, server: KaggleServer, folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        call, faults = FAULTS[name]
        server.fail(call, *faults)
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert not server.faults[call], "the fault never came"
        demand_whole(folder, server)
        told = capsys.readouterr()
        demand_nothing_secret(told.out + told.err)

    def test_a_drop_goes_on_where_it_stopped(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("GET", faulty.cut(300_000))
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert server.ranges[:2] == [None, "bytes=300000-"]
        assert server.count("DownloadDataFile") == len(WANTED)  # the address was still good

    def test_retries_end_and_partial_files_stay(self, server: KaggleServer, folder: Path, tmp_path: Path) -> None:
        server.fail("GET", faulty.cut(300_000), *[faulty.cut(0)] * 4)
        with pytest.raises(CarvanaError, match=r"train\.zip"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert server.ranges[5] == "bytes=300000-"

    @pytest.mark.parametrize("etags", [True, False])
    def test_a_file_that_changes_midway_is_begun_anew(
        self, server: KaggleServer, folder: Path, tmp_path: Path, etags: bool, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """With an ETag the server tells; without, the size or the CRCs do."""
        missing = () if etags else ("ETag", "x-goog-hash")

        def change(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
            server.files["train.zip"], server.version = zipped("train", 900_000 + 8), "2"
            return faulty.without(*missing)(handler, make) or faulty.Answer(500)

        server.fail("GET", faulty.both(faulty.without(*missing), faulty.cut(300_000)), change)
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        demand_whole(folder, server)
        assert "train.zip changed on Kaggle" in capsys.readouterr().err

    def test_a_file_that_always_comes_damaged(self, server: KaggleServer, folder: Path, tmp_path: Path) -> None:
        server.fail("GET", *[faulty.spoil] * 3)
        with pytest.raises(CarvanaError, match=r"train\.zip"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert not (folder / "train.zip").exists()

    def test_an_address_that_is_always_refused(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("GET", *[faulty.expire] * 4)
        with pytest.raises(CarvanaError, match=r"train\.zip.*403"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)

    def test_retry_after_is_honoured(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("ListDataFiles", faulty.status(503, "", {"Retry-After": "1"}))
        began = time.monotonic()
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert time.monotonic() - began >= 1

    def test_a_wish_for_a_long_pause_is_told(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("ListDataFiles", faulty.status(429, "", {"Retry-After": "3600"}))
        with pytest.raises(CarvanaError, match=r"429.*60 minutes"):
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)

    def test_control_characters_are_not_passed_on(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("ListDataFiles", faulty.status(400, f"\x1b[2J\x07no\u202e {TOKEN}"))
        with pytest.raises(CarvanaError) as caught:
            download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        assert str(caught.value) == "Kaggle rejected the request (400). Kaggle's message: [2J no ***"


def test_retry_after_as_a_number_a_date_or_neither() -> None:
    assert parse_retry_after("7") == 7
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    assert parse_retry_after("soon") is parse_retry_after("") is parse_retry_after(None) is None


# ---------------------------------------------------------------- kills

FETCH = """
from pathlib import Path
from pipeline.kaggle.commands import download_competition
from tests.fakes.fake_kaggle import FROM_KAGGLE, QUICK
download_competition(FROM_KAGGLE, Path(), policy=QUICK)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "nth", "fault"),
    [
        *(
            pytest.param(call, nth, fault, marks=pytest.mark.long)
            for call, nth, fault in (
                ("ListDataFiles", 0, faulty.kill()),
                ("DownloadDataFile", 0, faulty.kill()),
                ("GET", 0, faulty.kill(0)),
                ("GET", 1, faulty.kill(200_000)),
            )
        ),
        ("GET", 0, faulty.kill(400_000)),
        ("DownloadDataFile", 1, faulty.kill()),  # after the first file got its name
    ],
)
def test_a_killed_download_goes_on(
    server: KaggleServer,
    environment: dict[str, str],
    folder: Path,
    tmp_path: Path,
    call: str,
    nth: int,
    fault: Fault,
) -> None:
    server.fail(call, *[lambda handler, make: make()] * nth, fault)

    def run() -> int:
        process = subprocess.Popen([sys.executable, "-c", FETCH], cwd=tmp_path, env=environment)
        server.victim = process.pid
        return process.wait(timeout=60)

    assert run() == -9
    begun = {path.name: path.stat().st_size for path in folder.glob(".*.part") if "note" not in path.name}
    server.ranges.clear()
    assert run() == 0
    demand_whole(folder, server)
    if any(begun.values()):
        assert server.ranges[0] == f"bytes={max(begun.values())}-"


def test_two_downloads_at_once_wait_for_each_other(
    server: KaggleServer, environment: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    runs = [
        subprocess.Popen([sys.executable, "-c", FETCH], cwd=tmp_path, env=environment, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    demand_whole(folder, server)
    assert server.count("GET") == len(WANTED)


# ---------------------------------------------------------------- the check beforehand


@pytest.mark.usefixtures("kaggle")
class TestPreview:
    def test_tells_what_would_come_and_fetches_nothing(
        self, server: KaggleServer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        preview_competition(FROM_KAGGLE, tmp_path, QUICK)
        out = capsys.readouterr().out
        assert "Credentials: valid (from KAGGLE_API_TOKEN)." in out
        assert f"Rules of {COMPETITION}: accepted." in out
        assert "train.zip" in out
        assert " MB free" in out
        assert server.count("GET") == 0
        assert not folder.exists()

    def test_tells_what_is_here_and_what_changed(
        self, server: KaggleServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        download_competition(FROM_KAGGLE, tmp_path, policy=QUICK)
        server.listed_sizes["test.zip"] = 12
        preview_competition(FROM_KAGGLE, tmp_path, QUICK)
        told = capsys.readouterr()
        assert "Nothing to download" in told.out
        assert "test.zip changed on Kaggle: now 0.0 MB" in told.err

    def test_rules_that_are_not_accepted(self, server: KaggleServer, tmp_path: Path) -> None:
        server.fail("DownloadDataFile", faulty.status(403, "You must accept this competition's rules before ..."))
        with pytest.raises(CarvanaError, match=r"403.*rules.*http"):
            preview_competition(FROM_KAGGLE, tmp_path, QUICK)

    def test_says_so_where_nothing_would_be_fetched(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        preview_competition(DataSettings(source="sample"), tmp_path, QUICK)
        assert "data.source is 'sample', so nothing is downloaded" in capsys.readouterr().out


def test_a_pasted_address_is_taken_for_the_name() -> None:
    for given in (
        COMPETITION,
        f"https://www.kaggle.com/c/{COMPETITION}",
        f"https://www.kaggle.com/competitions/{COMPETITION}/data?select=train.zip",
        f"kaggle.com/competitions/{COMPETITION}/",
        f"competitions/{COMPETITION}#rules",
    ):
        assert DataSettings(source="kaggle", competition=given).competition == COMPETITION
    for given in ("two words", "", "https://example.org/c/x", "../x"):
        with pytest.raises(ValueError, match=r"data\.competition"):
            DataSettings(source="kaggle", competition=given)


@pytest.mark.usefixtures("kaggle")
def test_making_a_client_asks_nothing(server: KaggleServer, capfd: pytest.CaptureFixture[str]) -> None:
    KaggleClient(COMPETITION)
    assert server.asked == []
    assert capfd.readouterr() == ("", "")
