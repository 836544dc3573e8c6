"""Submissions by the real client to Kaggle on loopback: checked, kept, sent once, scored, remembered."""

import csv
import gzip
import hashlib
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipeline.competition.image_ids import format_image_id
from pipeline.config import DataSettings
from pipeline.errors import CarvanaError
from pipeline.kaggle import commands
from pipeline.kaggle.api_errors import OutcomeUnknownError
from pipeline.kaggle.client import LeaderboardEntry
from pipeline.kaggle.commands import show_leaderboard, show_submissions, submit
from pipeline.kaggle.ledger import LEDGER_COLUMNS, Ledger, LedgerRow, cv_lb_correlation
from tests import ROOT
from tests.fakes import fake_kaggle as faulty
from tests.fakes.fake_kaggle import FROM_KAGGLE, QUICK, Fault, KaggleServer, demand_nothing_secret

IDS = [format_image_id("00087a6bd4dc", angle) for angle in range(1, 17)]
CAR = "1 490000"
"""A fifth of the image."""


def table(masks: dict[str, str]) -> bytes:
    return ("img,rle_mask\n" + "".join(f"{image_id}.jpg,{text}\n" for image_id, text in masks.items())).encode()


def sample_submission() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("sample_submission.csv", table(dict.fromkeys(IDS, "1 1")))
    return file.getvalue()


@pytest.fixture
def server() -> KaggleServer:
    return KaggleServer({"sample_submission.csv.zip": sample_submission(), "train.zip": b"not asked for"})


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of git with a sound CSV of 16 masks."""
    folder = tmp_path / "project"
    (folder / "submissions").mkdir(parents=True)
    (folder / ".gitignore").write_text("/data/\n/submissions/s*\n/submissions/.*.lock\n")
    (folder / "dvc.lock").write_text("schema: '2.0'\n")
    write(folder, dict.fromkeys(IDS, CAR))
    for command in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message", "state")):
        git(folder, *command)
    monkeypatch.chdir(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=tester", "-c", "user.email=tester@example.com")
    run = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return run.stdout.strip()


def write(folder: Path, masks: dict[str, str], name: str = "submission.csv.gz") -> Path:
    path = folder / "submissions" / name
    path.write_bytes(gzip.compress(table(masks)) if name.endswith(".gz") else table(masks))
    return path


def send(message: str = "first", name: str = "submission.csv.gz", **options: bool) -> None:
    submit(Path("submissions") / name, message, FROM_KAGGLE, Path(), policy=QUICK, **options)


def rows() -> list[LedgerRow]:
    with Path("submissions/ledger.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def demand_one(server: KaggleServer, sent: int = 0) -> None:
    """Kaggle has exactly one submission, of the right bytes, and the ledger has it too."""
    assert len(server.submissions) == 1
    spent = [row for row in rows() if row["reference"]]
    assert [row["reference"] for row in spent] == [str(server.submissions[0]["ref"])]
    assert server.submissions[0]["description"].startswith(f"[{spent[0]['tag']}] ")
    content = gzip.decompress(server.sent(server.submissions[0]))
    assert content == table(dict.fromkeys(IDS, CAR))
    kept = Path("submissions/sent") / f"{hashlib.sha256(content).hexdigest()}.csv.gz"
    assert kept.read_bytes() == server.sent(server.submissions[0])
    assert not [row for row in rows() if row["status"] == "pending" and not row["reference"]]


@pytest.mark.usefixtures("kaggle", "project")
class TestSubmit:
    def test_sent_waited_for_and_noted(
        self, server: KaggleServer, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = hashlib.sha256(table(dict.fromkeys(IDS, CAR))).hexdigest()
        described = {
            "content_sha256": content,
            "own_dice": {"oof": {"a": 0.99, "b": 0.98, "ensemble": 0.995}, "holdout": 0.9931},
            "nets": ["a/0", "b/0"],
            "views": ["identity", "hflip"],
            "merge": "mean_probability",
            "weights": {"a": 2},
            "threshold": 0.5,
            "postprocess": ["refine_edges", "keep_largest"],
        }
        (project / "submissions" / "submission.json").write_text(json.dumps(described))
        send("flip, two nets", wait=True)
        demand_one(server)
        (row,) = rows()
        assert list(row) == list(LEDGER_COLUMNS)
        expected = {
            "status": "complete",
            "public_score": "0.99651",
            "private_score": "0.99632",
            "oof_dice": "0.995000",
            "holdout_dice": "0.993100",
            "description": "flip, two nets",
            "content_sha256": content,
            "git_commit": git(project, "rev-parse", "HEAD"),
            "git_clean": "yes",
            "dvc_lock_sha256": hashlib.sha256((project / "dvc.lock").read_bytes()).hexdigest(),
            "nets": "a/0 b/0",
            "views": "identity hflip",
            "merge": "mean_probability + refine_edges + keep_largest",
            "weights": '{"a": 2}',
            "threshold": "0.5",
            "error": "",
        }
        assert {column: row[column] for column in expected} == expected
        assert row["time_utc"].endswith("Z")
        told = capsys.readouterr()
        assert "Score: public 0.99651, private 0.99632" in told.out
        assert "Submissions left: 5" in told.out
        demand_nothing_secret(told.out + told.err + Path("submissions/ledger.csv").read_text())

    def test_facts_of_another_csv_are_not_taken(self, project: Path) -> None:
        described = {"content_sha256": "other", "own_dice": {"oof": {"a": 0.99}}, "nets": ["a/0"]}
        (project / "submissions" / "submission.json").write_text(json.dumps(described))
        send()
        (row,) = rows()
        assert (row["oof_dice"], row["nets"], row["dvc_lock_sha256"]) == ("", "", "")

    def test_a_tree_that_is_not_clean_but_for_the_ledger(self, project: Path) -> None:
        send()
        write(project, dict.fromkeys(IDS, "1 500000"))
        send("second")
        (project / "dvc.lock").write_text("schema: '2.1'\n")
        write(project, dict.fromkeys(IDS, "1 510000"))
        send("third")
        assert [row["git_clean"] for row in rows()] == ["yes", "yes", "no"]

    def test_without_git(self, project: Path) -> None:
        (project / ".git").rename(project.parent / "elsewhere")
        send()
        assert (rows()[0]["git_commit"], rows()[0]["git_clean"]) == ("", "")

    def test_what_git_can_not_tell_is_not_called_clean(self, project: Path) -> None:
        (project / ".git" / "index").write_bytes(b"broken")
        send()
        assert (rows()[0]["git_commit"] != "", rows()[0]["git_clean"]) == (True, "")

    def test_files_that_git_does_not_know_are_not_clean(self, project: Path) -> None:
        git(project, "config", "status.showUntrackedFiles", "no")
        (project / "new.py").touch()
        send()
        assert rows()[0]["git_clean"] == "no"

    def test_a_description_of_another_form(self, project: Path) -> None:
        (project / "submissions" / "submission.json").write_text("[]")
        send()
        assert rows()[0]["nets"] == ""

    @pytest.mark.parametrize("packed", ["plain.csv", "packed.zip"])
    def test_however_it_is_packed(self, server: KaggleServer, project: Path, packed: str) -> None:
        path = write(project, dict.fromkeys(IDS, CAR), "plain.csv")
        if packed.endswith(".zip"):
            with zipfile.ZipFile(path.with_name(packed), "w", zipfile.ZIP_DEFLATED) as archive:
                archive.write(path, "plain.csv")
        send(name=packed)
        demand_one(server)

    def test_what_was_sent_stays_as_it_was(self, server: KaggleServer, project: Path) -> None:
        send()
        write(project, dict.fromkeys(IDS, "1 500000"))  # in place
        demand_one(server)

    @pytest.mark.parametrize("mode", [0o444, 0o644])
    def test_what_dvc_holds_takes_no_room_twice(self, project: Path, mode: int) -> None:
        """Its links are read-only; what somebody may write to is copied."""
        text = " ".join(f"{start} 1" for start in range(1, 40_000, 2))
        path = project / "submissions" / "submission.csv.gz"
        path.write_bytes(gzip.compress(table(dict.fromkeys(IDS, text)), 0))
        path.chmod(mode)
        send()
        (sent,) = Path("submissions/sent").iterdir()
        assert sent.samefile(path) == (mode == 0o444)

    def test_a_link_of_dvcs_is_followed(self, project: Path) -> None:
        """Or what was sent would go with DVC's cache."""
        path, cached = project / "submissions" / "submission.csv.gz", project.parent / "cached"
        text = " ".join(f"{start} 1" for start in range(1, 40_000, 2))
        cached.write_bytes(gzip.compress(table(dict.fromkeys(IDS, text)), 0))
        cached.chmod(0o444)
        path.unlink()
        path.symlink_to(cached)
        send()
        cached.unlink()
        (sent,) = Path("submissions/sent").iterdir()
        assert gzip.decompress(sent.read_bytes()).startswith(b"img,rle_mask\n")

    def test_what_was_kept_and_changed_is_not_sent_again(self, server: KaggleServer) -> None:
        send()
        (kept,) = Path("submissions/sent").iterdir()
        good = kept.read_bytes()
        kept.write_bytes(gzip.compress(b"garbage"))
        send("again", again=True)
        assert kept.read_bytes() == server.sent(server.submissions[0]) == good

    def test_a_csv_that_changes_after_its_check_is_not_sent(
        self, server: KaggleServer, project: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server.fail("GetSubmissionLimits", lambda h, make: (write(project, dict.fromkeys(IDS, "1 500000")), make())[1])
        with pytest.raises(CarvanaError, match=r"submission\.csv\.gz"):
            send()
        assert server.submissions == []
        assert list(Path("submissions/sent").iterdir()) == []

    def test_what_a_kill_left_beside_the_kept_is_dropped(self) -> None:
        left = Path("submissions/sent/.x.csv.gz.12345678.part")
        left.parent.mkdir()
        left.touch()
        send()
        assert not left.exists()

    def test_the_last_submission_is_not_on_this_machine(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        send()
        for kept in Path("submissions/sent").iterdir():
            kept.unlink()
        write(project, dict.fromkeys(IDS, "1 500000"))
        send("second")
        assert "1000" in capsys.readouterr().out

    def test_waiting_is_taken_up_again(self, server: KaggleServer, capsys: pytest.CaptureFixture[str]) -> None:
        send()
        send(wait=True)
        demand_one(server)
        told = capsys.readouterr()
        assert "submitted before, as 1000" in told.out
        assert "Score: public 0.99651" in told.out
        assert "1000: 0 s" in told.err

    def test_a_submission_that_is_not_known_everywhere_yet(self, server: KaggleServer) -> None:
        server.fail("GetSubmission", faulty.status(404, "Not found"))
        send(wait=True)
        assert rows()[0]["status"] == "complete"

    def test_a_network_that_is_away_ends_no_waiting(self, server: KaggleServer) -> None:
        server.fail("GetSubmission", *[faulty.reset] * QUICK.tries, *[faulty.status(500)] * QUICK.tries)
        send(wait=True)
        assert rows()[0]["status"] == "complete"

    def test_no_score_in_an_hour(self, server: KaggleServer) -> None:
        server.scored_after = 10**9
        brief = faulty.replace(QUICK, longest_wait_s=0.1)
        with pytest.raises(CarvanaError, match=r"\b1000\b"):
            submit(Path("submissions/submission.csv.gz"), "x", FROM_KAGGLE, Path(), wait=True, policy=brief)
        assert rows()[0]["status"] == "pending"

    def test_dry_run_does_all_but_send(self, server: KaggleServer, capsys: pytest.CaptureFixture[str]) -> None:
        send(dry_run=True)
        assert server.submissions == []
        assert server.uploads == {}
        assert not Path("submissions/ledger.csv").exists()
        assert not Path("submissions/sent").exists()
        assert server.count("GetSubmissionLimits") == 1
        assert "Nothing was submitted" in capsys.readouterr().out

    def test_the_same_content_is_refused(self, server: KaggleServer, project: Path) -> None:
        send(wait=True)
        write(project, dict.fromkeys(IDS, CAR), "copy.csv")
        with pytest.raises(CarvanaError, match=r"1000.*0\.99651.*--again"):
            send(name="copy.csv")
        assert len(server.submissions) == 1
        send("again", name="copy.csv", again=True)
        assert len(server.submissions) == 2
        assert len({row["tag"] for row in rows()}) == 2

    def test_the_same_content_sent_from_another_machine_is_refused(self, server: KaggleServer) -> None:
        send()
        Path("submissions/ledger.csv").unlink()
        with pytest.raises(CarvanaError, match=r"1000.*--again"):
            send()

    def test_no_allowance(self, server: KaggleServer) -> None:
        server.allowed = 0
        server.submissions.append({"ref": 7, "description": "by hand"})
        with pytest.raises(CarvanaError, match=r"No submissions left \(1 made today\).*midnight"):
            send()
        server.limited_by_total = True
        with pytest.raises(CarvanaError, match=r"No submissions left \(1 made today\).*total limit"):
            send()
        assert server.uploads == {}
        assert not Path("submissions/ledger.csv").exists()

    def test_before_a_first_submission_kaggle_may_not_tell_the_limit(
        self, server: KaggleServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It counts for a team, and who never sent anything is in none."""
        server.fail("GetSubmissionLimits", lambda handler, make: faulty.found({}))
        send()
        assert "unknown" in capsys.readouterr().err
        demand_one(server)

    def test_the_difference_to_the_last_and_unlikely_masks_are_told(
        self, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        send()
        assert "No earlier submission" in capsys.readouterr().out
        changed = dict.fromkeys(IDS, CAR) | {IDS[0]: "", IDS[1]: "1 2000000", IDS[2]: "1 500"}
        write(project, changed)
        send("second")
        told = capsys.readouterr()
        same, second = 13, 2 * 490000 / (490000 + 2000000)
        third = 2 * 500 / (490000 + 500)
        assert f"last submission, 1000: {(same + second + third) / 16:.6f}" in told.out
        assert "1 of 16 masks are empty." in told.err
        assert f"{IDS[1]} with 81.5%" in told.err

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({IDS[3]: "5 2 6 1"}, rf"row 5 \({IDS[3]}\.jpg\): Run 2 \('6 1'\) overlaps"),
            ({IDS[3]: "9 1 2 1"}, "Run 2"),
            ({IDS[3]: "2455040 2"}, "the image has 2455040"),
            ({format_image_id("00087a6bd4dd", 1): CAR}, "not an expected image"),
        ],
    )
    def test_an_unsound_csv_is_refused_before_anything_is_sent(
        self, server: KaggleServer, project: Path, changes: dict[str, str], words: str
    ) -> None:
        write(project, dict.fromkeys(IDS, CAR) | changes)
        with pytest.raises(CarvanaError, match=words):
            send()
        assert server.uploads == {}
        assert not Path("submissions/ledger.csv").exists()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (b"", "the header is ''"),
            (b"image,mask\n", "the header is 'image,mask'"),
            (b"img,rle_mask\n", "16 of 16"),
        ],
    )
    def test_files_kaggle_would_reject_later_are_refused(
        self, server: KaggleServer, project: Path, content: bytes, words: str
    ) -> None:
        (project / "submissions" / "odd.csv").write_bytes(content)
        with pytest.raises(CarvanaError, match=words):
            send(name="odd.csv")
        assert server.uploads == {}

    def test_the_order_of_rows_is_free_and_none_may_miss(self, server: KaggleServer, project: Path) -> None:
        write(project, dict.fromkeys(IDS[1:], CAR))
        with pytest.raises(CarvanaError, match=rf"1 of 16.*{IDS[0]}"):
            send()
        write(project, dict.fromkeys(reversed(IDS), CAR))
        send()
        assert len(server.submissions) == 1

    def test_ids_of_the_drawn_sample_are_none_of_kaggles(self, server: KaggleServer, project: Path) -> None:
        """Even where the sample is what the pipeline runs on."""
        write(project, {format_image_id("0123456789ab", angle): CAR for angle in range(1, 17)})
        with pytest.raises(CarvanaError, match=r"\.csv"):
            submit(Path("submissions/submission.csv.gz"), "x", DataSettings(source="sample"), Path(), policy=QUICK)

    def test_error_description_of_kaggle_is_kept(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            server, "score", lambda item: item.update(status="ERROR", errorDescription="\x1b[31mwrong column")
        )
        with pytest.raises(CarvanaError, match=r"1000.*\[31mwrong column"):
            send(wait=True)
        assert (rows()[0]["status"], rows()[0]["error"]) == ("error", "[31mwrong column")

    def test_messages(self) -> None:
        with pytest.raises(CarvanaError, match="-m"):
            send(" \x1b ")
        with pytest.raises(CarvanaError, match=r"-m.*250"):
            send("x" * 251)

    def test_a_file_that_is_not_there(self) -> None:
        with pytest.raises(CarvanaError, match=r"none\.csv"):
            send(name="none.csv")


def after_all(fault: Fault) -> Fault:
    """What was asked is done, and then the fault comes."""

    def both(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer | None:
        make()
        return fault(handler, make)

    return both


def then_fail(call: str, *faults: Fault) -> Fault:
    """The answer is lost, and the next answers to another call fail too."""

    def fault(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> None:
        handler.owner.fail(call, *faults)

    return fault


def known(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
    """No fault."""
    return make()


ONCE: dict[str, tuple[str, list[Fault]]] = {
    "its answer is lost": ("CreateSubmission", [faulty.lose]),
    "its answer never comes": ("CreateSubmission", [after_all(faulty.hang)]),
    "its answer is an error, but it is there": ("CreateSubmission", [after_all(faulty.page(502))]),
    "its answer has no reference, but it is there": (
        "CreateSubmission",
        [after_all(lambda handler, make: faulty.found({"message": "ok"}))],
    ),
    "its answer can't be read": ("CreateSubmission", [after_all(lambda handler, make: faulty.Answer(200, b"?"))]),
    "its answer is lost, and the look-up fails at first": (
        "CreateSubmission",
        [after_all(then_fail("ListSubmissions", faulty.reset, faulty.status(500), faulty.hang))],
    ),
    "its answer is lost, and it comes late to the list": (
        "CreateSubmission",
        [after_all(then_fail("ListSubmissions", *[lambda handler, make: faulty.found({})] * 2))],
    ),
    "it is asked too often": ("CreateSubmission", [faulty.status(429, "", {"Retry-After": "0"})]),
    "it breaks off and nothing was done": ("CreateSubmission", [faulty.reset]),
    "the list does not come at first": ("ListSubmissions", [faulty.reset, faulty.status(500)]),
    "the upload answers 500": ("PUT", [faulty.page(500)]),
    "the upload answers 403": ("PUT", [faulty.page(403)]),
    "the upload breaks off": ("PUT", [faulty.reset]),
    "the upload breaks off midway": ("PUT", [faulty.Take(40)]),
    "the upload breaks off more often than there are tries": ("PUT", [faulty.Take(9), known] * 8),
    "the upload ends with 308": ("PUT", [faulty.Take(40, 308)]),
    "the upload breaks off, and nobody knows how far it came": ("PUT", [faulty.Take(40), faulty.page(410)]),
    "the upload's answer is lost": ("PUT", [faulty.lose]),
    "the upload's address does not come": ("StartSubmissionUpload", [faulty.reset]),
    "the limit does not come": ("GetSubmissionLimits", [faulty.hang]),
}


@pytest.mark.slow
@pytest.mark.usefixtures("kaggle", "project")
class TestOnce:
    @pytest.mark.parametrize("name", ONCE)
    def test_exactly_one_submission(self, server: KaggleServer, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        call, faults = ONCE[name]
        server.fail(call, *faults)
        send()
        assert not server.faults[call], "the fault never came"
        demand_one(server)
        assert len(rows()) == 1
        told = capsys.readouterr()
        demand_nothing_secret(told.out + told.err)

    def test_an_upload_goes_on_where_it_broke_off(self, server: KaggleServer) -> None:
        server.fail("PUT", faulty.Take(40))
        send()
        demand_one(server)
        assert server.count("StartSubmissionUpload") == 1

    def test_old_submissions_are_seen_on_later_pages(self, server: KaggleServer, project: Path) -> None:
        send()
        for number in range(5):
            server.submissions.insert(0, {"ref": 2000 + number, "description": "by hand"})
        Path("submissions/ledger.csv").unlink()
        with pytest.raises(CarvanaError, match=r"\b1000\b"):
            send()

    def test_no_reference_and_nothing_there(self, server: KaggleServer) -> None:
        server.fail("CreateSubmission", lambda handler, make: faulty.found({"message": "Could not submit"}))
        with pytest.raises(CarvanaError, match="Could not submit"):
            send()
        assert [row["status"] for row in rows()] == ["not sent"]
        send()
        demand_one(server)

    def test_the_upload_is_never_taken(self, server: KaggleServer) -> None:
        server.fail("PUT", *[faulty.page(403)] * 2)
        with pytest.raises(CarvanaError, match="403"):
            send()
        assert server.count("CreateSubmission") == 0
        assert [row["status"] for row in rows()] == ["not sent"]
        send()
        demand_one(server)

    def test_refused_with_a_reason(self, server: KaggleServer) -> None:
        server.fail("CreateSubmission", faulty.status(400, "Late submissions are off"))
        with pytest.raises(CarvanaError, match=r"400.*Late submissions are off"):
            send()
        (row,) = rows()
        assert (row["status"], row["reference"]) == ("not sent", "")
        assert "Late submissions are off" in row["error"]

    @pytest.mark.parametrize(
        "fault",
        [
            faulty.hang,
            faulty.status(504),
            lambda h, make: faulty.Answer(504, b'{"code": "GATEWAY_TIMEOUT"}', {"Content-Type": "application/json"}),
            lambda h, make: faulty.Answer(504, b"<html>", {"Content-Type": "application/json"}),
            lambda h, make: faulty.Answer(302, b"", {"Location": "http://elsewhere.test"}),
        ],
        ids=["time-out", "504", "odd code", "no JSON", "led elsewhere"],
    )
    def test_what_may_be_done_yet_is_not_sent_again_in_this_run(self, server: KaggleServer, fault: Fault) -> None:
        """Kaggle may be slower than any look-up: the next command looks once more."""
        server.fail("CreateSubmission", fault)
        with pytest.raises(CarvanaError, match="again"):
            send()
        assert server.count("CreateSubmission") == 1
        assert [row["status"] for row in rows()] == ["pending"]
        send()
        demand_one(server)

    def test_lost_for_now_stays_open_and_is_what_the_same_command_finds(
        self, server: KaggleServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        send()
        hidden = faulty.found({})
        never: list[Fault] = [lambda handler, make: hidden] * 40

        def late(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
            handler.owner.fail("ListSubmissions", *never)
            make()
            return faulty.Answer(504)

        server.fail("CreateSubmission", late)
        with pytest.raises(OutcomeUnknownError, match="not on Kaggle so far"):
            send("x", again=True)
        server.faults["ListSubmissions"].clear()
        assert [row["status"] for row in rows()] == ["pending", "pending"]
        send("x", again=True)
        assert "interrupted submission had arrived, as 1001" in capsys.readouterr().out
        assert len(server.submissions) == 2

    @pytest.mark.parametrize(
        "fault",
        [faulty.status(429), faulty.status(403, "rules"), faulty.reset],
        ids=["too often", "refused", "no network"],
    )
    def test_a_look_up_that_fails_leaves_the_row_open(self, server: KaggleServer, fault: Fault) -> None:
        server.fail("CreateSubmission", after_all(then_fail("ListSubmissions", *[fault] * QUICK.tries)))
        with pytest.raises(OutcomeUnknownError, match="Could not check"):
            send()
        server.faults["ListSubmissions"].clear()
        assert [row["status"] for row in rows()] == ["pending"]
        send(wait=True)
        demand_one(server)

    @pytest.mark.parametrize(
        "second", [faulty.status(400, "token already used"), faulty.status(429, "", {"Retry-After": "99999"})]
    )
    def test_a_refusal_of_the_second_try_says_nothing_of_the_first(self, server: KaggleServer, second: Fault) -> None:
        """The list shows the first one late."""
        hide = then_fail("ListSubmissions", *[lambda handler, make: faulty.found({})] * 12)
        server.fail("CreateSubmission", after_all(hide), second)
        with pytest.raises(OutcomeUnknownError, match="not on Kaggle so far"):
            send()
        assert [row["status"] for row in rows()] == ["pending"]
        server.faults["ListSubmissions"].clear()
        send(wait=True)
        demand_one(server)

    def test_an_upload_that_comes_no_further_ends(self, server: KaggleServer) -> None:
        forgets = [faulty.Take(40), known, faulty.reset, faulty.page(410)]
        server.fail("PUT", *forgets * 20)
        with pytest.raises(CarvanaError, match="upload"):
            send()
        assert server.count("PUT") < 30
        assert [row["status"] for row in rows()] == ["not sent"]

    def test_a_start_of_the_upload_that_fails_leaves_no_open_row(self, server: KaggleServer) -> None:
        server.fail("StartSubmissionUpload", *[faulty.status(500)] * QUICK.tries)
        with pytest.raises(CarvanaError, match=r"50\d"):
            send()
        assert [row["status"] for row in rows()] == ["not sent"]

    def test_a_long_pause_that_is_asked_for_is_not_waited_for(self, server: KaggleServer) -> None:
        server.fail("CreateSubmission", faulty.status(503, "", {"Retry-After": "86400"}))
        brief = faulty.replace(QUICK, longest_retry_after_s=0.2)
        with pytest.raises(OutcomeUnknownError, match="not on Kaggle so far"):
            submit(Path("submissions/submission.csv.gz"), "x", FROM_KAGGLE, Path(), policy=brief)

    def test_a_row_that_git_took_away_meanwhile_comes_back(self, server: KaggleServer) -> None:
        def take(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
            Path("submissions/ledger.csv").unlink()
            return make()

        server.fail("CreateSubmission", take)
        send()
        demand_one(server)

    def test_a_submission_on_its_way_is_left_alone(
        self, server: KaggleServer, environment: dict[str, str], project: Path
    ) -> None:
        """By whoever lists submissions meanwhile."""
        seen: list[str] = []

        def look(handler: faulty.Handler, make: Callable[[], faulty.Answer]) -> faulty.Answer:
            run = subprocess.run([sys.executable, "-c", LIST], cwd=project, env=environment, check=False)
            seen.extend([str(run.returncode), *(row["status"] for row in rows())])
            return make()

        server.fail("StartSubmissionUpload", look)
        submit(
            Path("submissions/submission.csv.gz"),
            "x",
            FROM_KAGGLE,
            project,
            policy=faulty.replace(QUICK, read_s=20),
        )
        assert seen == ["0", "pending"]
        demand_one(server)

    def test_a_row_that_came_late_is_healed_by_its_tag(self, server: KaggleServer) -> None:
        """Even one that was given up, should Kaggle be that slow."""
        send()
        text = Path("submissions/ledger.csv").read_text()
        Path("submissions/ledger.csv").write_text(text.replace(",1000,", ",,").replace(",pending,", ",not sent,"))
        assert (rows()[0]["reference"], rows()[0]["status"]) == ("", "not sent")
        show_submissions(FROM_KAGGLE, as_json=False, policy=QUICK)
        demand_one(server)


# ---------------------------------------------------------------- kills

HEAD = """
from pathlib import Path
from pipeline.kaggle.commands import show_submissions, submit
from tests.fakes.fake_kaggle import FROM_KAGGLE, QUICK
"""
SUBMIT = f"{HEAD}submit(Path('submissions/submission.csv.gz'), 'killed', FROM_KAGGLE, Path(), policy=QUICK)"
LIST = f"{HEAD}show_submissions(FROM_KAGGLE, as_json=False, policy=QUICK)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "fault"),
    [
        *(
            pytest.param(call, fault, marks=pytest.mark.long)
            for call, fault in (
                ("ListSubmissions", faulty.kill()),
                ("GetSubmissionLimits", faulty.kill()),
                ("StartSubmissionUpload", faulty.kill()),
                ("PUT", faulty.kill()),
                ("PUT", faulty.kill(done=True)),
            )
        ),
        ("CreateSubmission", faulty.kill()),
        ("CreateSubmission", faulty.kill(done=True)),
        ("CreateSubmission", faulty.kill(5)),
    ],
)
@pytest.mark.parametrize("next_command", ["submit", "submissions"])
def test_after_a_kill_there_is_one_submission(
    server: KaggleServer,
    environment: dict[str, str],
    project: Path,
    call: str,
    fault: Fault,
    next_command: str,
) -> None:
    server.fail(call, fault)

    def run(code: str) -> tuple[int, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=project, env=environment, stderr=subprocess.PIPE, text=True
        )
        server.victim = process.pid
        return (process.wait(timeout=60), process.communicate()[1])

    assert run(SUBMIT)[0] == -9
    if next_command == "submissions":
        status, err = run(LIST)
        assert status == 0, err
        if Path("submissions/ledger.csv").exists():
            assert not [row for row in rows() if row["status"] == "pending" and not row["reference"]]
    status, err = run(SUBMIT)
    assert status == 0 or "was submitted before" in err, err
    demand_one(server)


def test_two_processes_submit_once(server: KaggleServer, environment: dict[str, str], project: Path) -> None:
    def start(code: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", code], cwd=project, env=environment, stderr=subprocess.PIPE, text=True
        )

    runs = [start(SUBMIT), start(SUBMIT), start(LIST)]
    errors = [run.communicate(timeout=60)[1] for run in runs]
    assert sorted(run.returncode for run in runs[:2]) == [0, 1]
    assert runs[2].returncode == 0, errors[2]
    assert "was submitted before" in errors[0] + errors[1]
    demand_one(server)


# ---------------------------------------------------------------- the ledger


def row(**cells: str) -> LedgerRow:
    return dict.fromkeys(LEDGER_COLUMNS, "") | cells


class TestLedger:
    def test_columns_and_rows_of_the_user_stay(self, tmp_path: Path) -> None:
        file = tmp_path / "ledger.csv"
        header = ",".join([*LEDGER_COLUMNS, "note"])
        file.write_text(
            f'{header}\n{",".join(["x"] * 2 + ["t1"] + ["x"] * (len(LEDGER_COLUMNS) - 3))},"mine, ""all"""\n'
        )
        ledger = Ledger(file)
        ledger.add(row(tag="t2"))
        ledger.update(row(tag="t2"), {"status": "complete"})
        assert [(found["tag"], found["note"]) for found in ledger.rows()] == [("t1", 'mine, "all"'), ("t2", "")]

    def test_a_spreadsheets_mark_is_read_over(self, tmp_path: Path) -> None:
        file = tmp_path / "ledger.csv"
        file.write_text(",".join(LEDGER_COLUMNS) + "\n", encoding="utf-8-sig")
        Ledger(file).add(row(tag="t"))
        assert [found["tag"] for found in Ledger(file).rows()] == ["t"]

    def test_rows_without_a_tag_are_told_apart_by_their_reference(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ledger.csv")
        for reference in ("77", "78"):
            ledger.add(row(reference=reference))
        ledger.update(row(reference="78"), {"public_score": "0.9"})
        assert [(found["reference"], found["public_score"]) for found in ledger.rows()] == [("77", ""), ("78", "0.9")]

    def test_an_older_answer_takes_no_score_back(self, tmp_path: Path) -> None:
        ledger = Ledger(tmp_path / "ledger.csv")
        ledger.add(row(tag="t", reference="7", status="complete", public_score="0.9"))
        ledger.update(row(tag="t"), {"status": "pending", "public_score": "", "reference": "7"})
        assert (ledger.rows()[0]["status"], ledger.rows()[0]["public_score"]) == ("complete", "0.9")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a,b\n", r"ledger\.csv.*time_utc"),
            (",".join(LEDGER_COLUMNS) + "\n1,2\n", r"ledger\.csv.*line 2"),
            (",".join(LEDGER_COLUMNS) + "\n<<<<<<< HEAD\n", r"ledger\.csv.*line 2.*merge conflict"),
            (",".join(LEDGER_COLUMNS) + '\n"', r"ledger\.csv.*unexpected end"),
        ],
    )
    def test_a_damaged_file_is_refused_and_left_alone(self, tmp_path: Path, text: str, words: str) -> None:
        file = tmp_path / "ledger.csv"
        file.write_text(text)
        with pytest.raises(CarvanaError, match=words):
            Ledger(file).add(row(tag="t"))
        assert file.read_text() == text

    def test_many_at_once_lose_nothing(self, tmp_path: Path) -> None:
        code = (
            "import sys; from pathlib import Path; from pipeline.kaggle.ledger import *\n"
            "for n in range(10):\n"
            "    Ledger(Path('ledger.csv')).add(dict.fromkeys(LEDGER_COLUMNS, '') | {'tag': sys.argv[1] + str(n)})"
        )
        runs = [subprocess.Popen([sys.executable, "-c", code, w], cwd=tmp_path) for w in "abcd"]
        assert [run.wait(timeout=60) for run in runs] == [0] * 4
        assert len({found["tag"] for found in Ledger(tmp_path / "ledger.csv").rows()}) == 40

    def test_the_projects_own_ledger_is_sound(self) -> None:
        Ledger(ROOT / "submissions" / "ledger.csv").rows()


# ---------------------------------------------------------------- scores


def scored(own: Sequence[float], public: Sequence[float]) -> list[LedgerRow]:
    pairs = enumerate(zip(own, public, strict=True))
    return [row(tag=str(n), content_sha256=str(n), holdout_dice=str(a), public_score=str(b)) for n, (a, b) in pairs]


@pytest.mark.usefixtures("kaggle", "project")
class TestStanding:
    def test_fresh_scores_as_a_table_and_as_json(
        self, server: KaggleServer, project: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for number in range(3):
            write(project, dict.fromkeys(IDS, f"1 {490000 + number}"))
            send(f"number {number}")
        for item in server.submissions:
            server.score(item)
        server.submissions.insert(0, {"ref": 77, "description": "by hand"})
        capsys.readouterr()
        show_submissions(FROM_KAGGLE, as_json=False, policy=QUICK)
        out = capsys.readouterr().out
        lines = out.splitlines()
        assert lines[0].split("  ")[0] == "time"
        assert [line.split()[1:5] for line in lines[1:4]] == [
            [str(1000 + number), "complete", "0.99651", "0.99632"] for number in range(3)
        ]
        assert "1 more submissions on Kaggle" in out
        assert "  77  pending  -  by hand" in out
        show_submissions(FROM_KAGGLE, as_json=True, policy=QUICK)
        content = json.loads(capsys.readouterr().out)
        assert [found["status"] for found in content["submissions"]] == ["complete"] * 3
        assert [found["reference"] for found in content["unknown"]] == [77]

    def test_nothing_sent_yet(self, capsys: pytest.CaptureFixture[str]) -> None:
        show_submissions(FROM_KAGGLE, as_json=False, policy=QUICK)
        assert "No submissions" in capsys.readouterr().out

    def test_correlation_from_three_on(self) -> None:
        assert cv_lb_correlation(scored([0.99, 0.98], [0.9, 0.8])) == []
        (found,) = cv_lb_correlation(scored([1, 2, 3, 4], [2, 4, 6, 9]))
        assert (found.cv_column, found.submissions) == ("holdout_dice", 4)
        assert found.correlation == pytest.approx(0.9945, abs=1e-3)
        assert cv_lb_correlation(scored([1, 1, 1], [1, 2, 3]))[0].correlation is None
        same = scored([1, 2, 3], [1, 2, 3])
        for again in same:
            again["content_sha256"] = "one"
        assert cv_lb_correlation(same) == []

    def test_leaderboard(self, server: KaggleServer, capsys: pytest.CaptureFixture[str]) -> None:
        server.board = [(f"team {n}", f"{0.9974 - n / 10000:.6f}") for n in range(9)] + [("\x1b[2Jbad", "0.99")]
        show_leaderboard(FROM_KAGGLE, 0.99715, public=False, policy=QUICK)
        out = capsys.readouterr().out
        assert "0.997150 would rank 4 of 11 on the private leaderboard" in out
        assert "\x1b" not in out
        lines = [line.split() for line in out.splitlines() if line.startswith("   ")]
        assert [line[0] for line in lines] == ["1", "2", "3", "4", "4", "5", "6"]
        assert lines[3] == ["4", "0.997150", "<-", "here"]

    def test_leaderboard_of_the_best_so_far(self, server: KaggleServer, capsys: pytest.CaptureFixture[str]) -> None:
        server.board = [("first", "0.9973"), ("second", "0.9960")]
        with pytest.raises(CarvanaError, match="private"):
            show_leaderboard(FROM_KAGGLE, None, public=False, policy=QUICK)
        send(wait=True)
        show_leaderboard(FROM_KAGGLE, None, public=True, policy=QUICK)
        assert "0.996510 would rank 2 of 3 on the public leaderboard" in capsys.readouterr().out

    def test_leaderboard_rank_of_a_score(self) -> None:
        board = [LeaderboardEntry("a", 0.9), LeaderboardEntry("b", 0.8), LeaderboardEntry("c", 0.8)]
        assert [commands.rank(board, score) for score in (0.95, 0.9, 0.85, 0.8, 0.7)] == [1, 1, 2, 2, 4]
        assert commands.rows_around([], 0.5) == [("1", "0.500000", "<- here")]
