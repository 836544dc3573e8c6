"""The whole path as users go it: download, repro, check, submit, wait, ledger, against Kaggle on loopback."""

import csv
import json
from pathlib import Path

import pytest

from pipeline.submission.csv_file import content_digest
from tests.end_to_end.dvc_project import TINY, Project
from tests.fakes.fake_kaggle import COMPETITION, KaggleServer, demand_nothing_secret

QUICKER = {"folds.active": [0], "train.epochs": 1}


@pytest.fixture
def server(tiny_sample: Path) -> KaggleServer:
    return KaggleServer({path.name: path.read_bytes() for path in tiny_sample.glob("*.zip")})


@pytest.mark.slow
@pytest.mark.usefixtures("kaggle")
def test_from_account_to_scored_submission(server: KaggleServer, tmp_path: Path) -> None:
    address = f"https://www.kaggle.com/c/{COMPETITION}/overview"
    project = Project(tmp_path / "project", TINY | QUICKER | {"data.source": "kaggle", "data.competition": address})
    said = project.run("carvana", "download", "--check")
    assert "accepted" in said
    assert server.count("GET") == 0
    said += project.run("carvana", "repro")
    project.commit()
    assert server.count("GET") == 5
    said += project.run("carvana", "check")
    said += project.run("carvana", "submit", "-m", "the whole path", "--dry-run")
    assert server.submissions == []
    said += project.run("carvana", "submit", "-m", "the whole path", "--wait")
    said += project.run("carvana", "submit", "-m", "once more", status=1)
    assert len(server.submissions) == 1

    with (project.folder / "submissions/ledger.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    described = project.read("submissions/submission.json")
    assert row["status"] == "complete"
    assert row["public_score"] == "0.99651"
    assert row["git_clean"] == "yes"
    assert row["content_sha256"] == described["content_sha256"]
    assert float(row["oof_dice"]) == pytest.approx(described["own_dice"]["oof"]["small"], abs=1e-6)
    assert float(row["holdout_dice"]) == pytest.approx(described["own_dice"]["holdout"], abs=1e-6)
    sent = project.folder / "submissions/sent" / f"{row['content_sha256']}.csv.gz"
    assert content_digest(sent) == row["content_sha256"]

    said += (listed := project.run("carvana", "submissions", "--json"))
    assert json.loads(listed)["submissions"][0]["reference"] == row["reference"]
    server.board = [("best", "0.997332"), ("third", "0.99")]
    said += project.run("carvana", "leaderboard")
    assert "rank 2 of 3" in said

    server.asked.clear()
    project.commit()
    assert project.changed() == set(), "the ledger and what was sent are none of DVC's"
    said += project.run("carvana", "repro")
    assert server.asked == [], "what is here is not asked for again"
    demand_nothing_secret(said)
