"""Credentials from every place, what each refusal of Kaggle's says, and what the commands load and print."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import CarvanaError
from pipeline.kaggle import client
from pipeline.kaggle.api_errors import RejectedError
from pipeline.kaggle.client import KaggleClient
from tests import ROOT
from tests.fakes import fake_kaggle as faulty
from tests.fakes.fake_kaggle import COMPETITION, KEY, QUICK, TOKEN, USER, KaggleServer, demand_nothing_secret

LATER, EARLIER = (
    (datetime.now(UTC) + timedelta(hours=hours)).isoformat()
    for hours in (3, -0.25)  # the client sees -0.25 as good
)


@pytest.fixture
def server() -> KaggleServer:
    return KaggleServer({"train.zip": b"x"})


def kaggle_folder() -> Path:
    folder = Path.home() / ".kaggle"
    folder.mkdir(exist_ok=True)
    return folder


def private(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)


def ask() -> KaggleClient:
    """Ask Kaggle for something, and return who asked."""
    asking = KaggleClient(COMPETITION, QUICK)
    assert [file.name for file in asking.files()] == ["train.zip"]
    return asking


@pytest.mark.usefixtures("kaggle")
class TestCredentials:
    @pytest.fixture(autouse=True)
    def none_at_first(self, kaggle: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("KAGGLE_API_TOKEN")

    def test_a_token_in_a_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", f"{TOKEN}\n")  # as pasted
        assert ask().source == "KAGGLE_API_TOKEN"

    def test_a_file_named_by_a_variable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        private(tmp_path / "token", TOKEN)
        monkeypatch.setenv("KAGGLE_API_TOKEN", str(tmp_path / "token"))
        assert ask().source == "KAGGLE_API_TOKEN"

    @pytest.mark.parametrize("name", ["access_token", "access_token.txt"])
    def test_a_token_in_its_file(self, name: str) -> None:
        private(kaggle_folder() / name, TOKEN)
        assert ask().source == "~/.kaggle/access_token"

    def test_a_key_in_variables(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY)
        assert ask().source == "KAGGLE_USERNAME and KAGGLE_KEY"

    @pytest.mark.parametrize("place", [".kaggle", ".config/kaggle", "elsewhere"])
    def test_a_key_in_its_file(self, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
        file = Path.home() / place / "kaggle.json"
        private(file, json.dumps({"username": USER, "key": KEY}))
        if place == "elsewhere":
            monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(file.parent))
        assert ask().source == str(file)

    def test_a_key_that_others_can_read_is_warned_of(self, capsys: pytest.CaptureFixture[str]) -> None:
        file = kaggle_folder() / "kaggle.json"
        private(file, json.dumps({"username": USER, "key": KEY}))
        file.chmod(0o644)
        ask()
        assert f"'chmod 600 {file}'" in capsys.readouterr().err

    def test_a_login(self, server: KaggleServer) -> None:
        stored = {"refresh_token": "r", "access_token": TOKEN, "access_token_expiration": LATER}
        private(kaggle_folder() / "credentials.json", json.dumps(stored))
        assert ask().source == f"the login in {kaggle_folder() / 'credentials.json'}"
        assert server.count("GenerateAccessToken") == 0

    def test_a_login_that_has_run_out_is_renewed(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        file = kaggle_folder() / "credentials.json"
        stored = {"refresh_token": "refresh", "access_token": "old", "access_token_expiration": EARLIER}
        private(file, json.dumps(stored))
        answer = {"token": TOKEN, "expiresIn": 3600}
        monkeypatch.setattr(server, "_GenerateAccessToken", lambda given: faulty.found(answer), raising=False)
        monkeypatch.setattr(faulty.Handler, "_known", lambda self: True)  # a login is renewed without credentials
        ask()
        assert json.loads(file.read_text())["access_token"] == TOKEN

    def test_a_login_that_is_none(self) -> None:
        private(kaggle_folder() / "credentials.json", "{}")
        with pytest.raises(CarvanaError, match=r"credentials\.json"):
            ask()

    def test_a_bad_token_does_not_shadow_a_good_key(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", "expired")
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY)
        assert ask().source == "KAGGLE_USERNAME and KAGGLE_KEY"
        assert "credentials from KAGGLE_API_TOKEN (401)" in capsys.readouterr().err

    def test_all_are_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", "expired")
        with pytest.raises(CarvanaError, match=r"KAGGLE_API_TOKEN.*401"):
            ask()

    def test_no_credentials(self, tmp_path: Path) -> None:
        private(kaggle_folder() / "kaggle.json", "{'username': 1}")
        with pytest.raises(CarvanaError, match=r"kaggle\.json.*JSON") as e:
            KaggleClient(COMPETITION)
        assert "'Create New Token'" in str(e.value)

    @pytest.mark.parametrize("value", ["two words", "line\nbreak", "schlüssel"])
    def test_malformed_credentials_are_not_printed(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", value)
        with pytest.raises(CarvanaError, match="KAGGLE_API_TOKEN") as caught:
            KaggleClient(COMPETITION)
        assert value not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("access_token", f"{TOKEN}\n".encode("utf-16")),
            ("access_token", b""),
            ("kaggle.json", f'{{"username": "{USER}", "key": "{KEY}"}}'.encode("utf-16")),
            ("kaggle.json", f'["{KEY}"]'.encode()),
            ("kaggle.json", f'{{"key": "{KEY}"}}'.encode()),
            ("kaggle.json", b""),
        ],
    )
    def test_unfit_files_are_named(self, name: str, content: bytes) -> None:
        (kaggle_folder() / name).write_bytes(content)
        with pytest.raises(CarvanaError, match=name) as caught:
            KaggleClient(COMPETITION)
        demand_nothing_secret(str(caught.value))

    def test_quotes_in_a_variable_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", f'"{TOKEN}"')
        with pytest.raises(CarvanaError, match=r"KAGGLE_API_TOKEN.*quot") as caught:
            KaggleClient(COMPETITION)
        demand_nothing_secret(str(caught.value))

    def test_credentials_are_not_in_repr(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        demand_nothing_secret(repr(vars(KaggleClient(COMPETITION))))

    def test_what_can_be_none_does_not_stop_one_that_is(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
        private(kaggle_folder() / "kaggle.json", json.dumps({"username": "your name", "key": "your key"}))
        assert ask().source == "KAGGLE_API_TOKEN"
        assert "kaggle.json has invalid characters" in capsys.readouterr().err

    def test_a_token_longer_than_a_path_may_be(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        token = "KGAT_" + "x" * 5000
        server.tokens.add(token)
        monkeypatch.setenv("KAGGLE_API_TOKEN", token)
        assert ask().source == "KAGGLE_API_TOKEN"

    def test_a_file_that_is_not_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_API_TOKEN", "/no/such/file")
        with pytest.raises(CarvanaError, match=r"KAGGLE_API_TOKEN.*file"):
            KaggleClient(COMPETITION)

    def test_a_login_that_runs_out_midway_is_renewed(
        self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = kaggle_folder() / "credentials.json"
        stored = {"refresh_token": "refresh", "access_token": TOKEN, "access_token_expiration": LATER}
        private(file, json.dumps(stored))
        asking = ask()
        private(file, json.dumps(stored | {"access_token_expiration": EARLIER}))
        answer = {"token": f"{TOKEN}2", "expiresIn": 36000}
        monkeypatch.setattr(server, "_GenerateAccessToken", lambda given: faulty.found(answer), raising=False)
        monkeypatch.setattr(faulty.Handler, "_known", lambda self: True)
        server.fail("GenerateAccessToken", faulty.status(500), faulty.reset)
        asking.files()
        asking.files()
        assert server.count("GenerateAccessToken") == 3

    def test_a_login_that_is_refused_is_not_shown(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        stored = {"refresh_token": "refresh-secret", "access_token": "old", "access_token_expiration": EARLIER}
        private(kaggle_folder() / "credentials.json", json.dumps(stored))
        server.fail("GenerateAccessToken", faulty.status(400, "refresh-secret is revoked"))
        with pytest.raises(CarvanaError, match=r"\*\*\* is revoked"):
            ask()

    def test_a_login_file_of_another_form(self) -> None:
        private(kaggle_folder() / "credentials.json", "[]")
        with pytest.raises(CarvanaError, match=r"credentials\.json"):
            ask()

    def test_an_echo_of_the_header_is_not_shown(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KAGGLE_USERNAME", USER)
        monkeypatch.setenv("KAGGLE_KEY", KEY)
        server.fail("ListDataFiles", lambda h, make: faulty.refusal(400, h.headers["Authorization"]))
        with pytest.raises(CarvanaError, match=r"Basic \*\*\*"):
            ask()


REFUSALS = {
    "rules": (403, "You must accept this competition's rules before you'll be able to download files.", "accept the"),
    "phone": (
        403,
        "Please verify your phone number",
        "verify your account by phone at https://www.kaggle.com/settings",
    ),
    "name": (403, "Permission 'competitions.get' was denied", "data.competition"),
    "any": (403, "Permission 'competitions.participate' was denied", "/rules.*by phone.*data.competition"),
    "unknown": (404, "Not found", "data.competition in params.yaml"),
    "bad": (400, "File has 3 columns", "rejected the request (400)"),
    "silent": (400, "", "(400). It gave no reason"),
    "often": (429, "", "Too many requests to Kaggle (429)"),
    "down": (500, "", "server error (500)"),
}


@pytest.mark.usefixtures("kaggle")
class TestRefusals:
    @pytest.mark.parametrize("name", REFUSALS)
    def test_api_errors_name_a_remedy(self, server: KaggleServer, name: str) -> None:
        code, said, words = REFUSALS[name]
        server.fail("ListDataFiles", *[faulty.status(code, said)] * QUICK.tries)
        with pytest.raises(CarvanaError) as caught:
            KaggleClient(COMPETITION, QUICK).files()
        for part in words.split(".*"):
            assert part in str(caught.value)
        assert said in str(caught.value)
        assert server.count("ListDataFiles") == (QUICK.tries if code in (429, 500) else 1)

    def test_a_mistyped_competition(self) -> None:
        with pytest.raises(CarvanaError, match="carvana-image-masking"):
            KaggleClient("carvana-image-masking", QUICK).files()

    def test_an_error_within_a_sound_answer(self, server: KaggleServer) -> None:
        server.fail("ListDataFiles", lambda h, make: faulty.replace(faulty.refusal(403, "rules"), status=200))
        with pytest.raises(CarvanaError, match="rules"):
            KaggleClient(COMPETITION, QUICK).files()

    def test_no_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        with pytest.raises(CarvanaError, match="network"):
            KaggleClient(COMPETITION, QUICK).files()

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("HTTP_PROXY", "http://", "HTTP_PROXY"),
            ("HTTP_PROXY", "socks5://127.0.0.1:1080", "HTTP_PROXY"),
            ("HTTP_PROXY", "ftp://127.0.0.1:1080", "HTTP_PROXY"),
            ("HTTP_PROXY", "http://127.0.0.1:port", "HTTP_PROXY"),
            ("KAGGLE_API_ENVIRONMENT", "live", "KAGGLE_API_ENVIRONMENT is not"),
        ],
    )
    def test_a_set_up_that_stands_in_the_way(
        self, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
    ) -> None:
        monkeypatch.setenv(name, value)
        monkeypatch.setenv(name.lower(), value)
        with pytest.raises(CarvanaError, match=words):
            KaggleClient(COMPETITION, QUICK).files()

    def test_a_missing_certificate_file_is_not_retried(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is sent: requests looks for the file first."""
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/no/such/bundle.pem")
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "PROD")
        with pytest.raises(RejectedError, match="/no/such/bundle"):
            KaggleClient(COMPETITION, QUICK).files()

    def test_a_proxy_that_lets_nothing_through(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing was sent then; the true service is asked by https, through a tunnel."""
        for name in ("HTTPS_PROXY", "https_proxy"):
            monkeypatch.setenv(name, os.environ["HTTP_PROXY"])
        monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "PROD")
        with pytest.raises(CarvanaError, match="HTTPS_PROXY"):
            KaggleClient(COMPETITION, QUICK).files()

    def test_a_server_that_goes_round_in_circles(self, server: KaggleServer, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = {"files": [{"name": "train.zip"}], "nextPageToken": "same"}
        monkeypatch.setattr(server, "_ListDataFiles", lambda given: faulty.found(answer))
        assert len(KaggleClient(COMPETITION, QUICK).files()) == 2

    def test_a_board_without_scores(self, server: KaggleServer) -> None:
        server.board = [("a", "0.9"), ("b", "")]
        assert KaggleClient(COMPETITION, QUICK).leaderboard(public=True) == [client.LeaderboardEntry("a", 0.9)]


def test_importing_pipeline_kaggle_has_no_side_effect(server: KaggleServer, environment: dict[str, str]) -> None:
    code = "import pipeline.kaggle.commands, sys; assert not {'torch', 'kaggle'} & sys.modules.keys()"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert server.asked == []
    assert list(Path(environment["HOME"]).iterdir()) == []


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_nothing_secret_is_shown_even_in_a_traceback(
    server: KaggleServer, environment: dict[str, str], tmp_path: Path, debug: list[str]
) -> None:
    """Nor in the list of processes, nor to the storage."""
    (tmp_path / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text().replace("source: sample", "source: kaggle")
    )
    server.files = {f"{name}.zip": b"PK\x03\x04no zip" for name in ("train", "test", "train_masks.csv")} | {
        "metadata.csv": b"id\n",
        "sample_submission.csv": b"img\n",
    }
    listed: list[str] = []

    def look(handler: faulty.Handler, make: object) -> faulty.Answer:
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                listed.append(line.read_text())
            except OSError:
                continue
        return faulty.Answer(400, json.dumps({"code": 400, "message": f"{TOKEN} is odd"}).encode())

    server.fail("DownloadDataFile", look)
    run = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli import main; main()", "download", *debug],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert "*** is odd" in run.stderr
    demand_nothing_secret(run.stdout + run.stderr + "".join(listed))
    assert any(str(os.getpid()) in line or "pytest" in line for line in listed)
