"""The app on a project that ran, scored by its own numbers and visited in a browser."""

import csv
import io
import shutil
import signal
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image

from pipeline import workspace
from pipeline.ablation.runner import scoring_groups
from pipeline.app import page_parts
from pipeline.app.worst_images import score_images, setting_of
from pipeline.competition import rle
from pipeline.config import EnsembleSettings, read_params
from pipeline.report.tables import read_table, rows_of_split
from pipeline.segment import segmenter
from pipeline.segment.image_loader import load_image
from pipeline.segment.segmenter import Segmenter
from tests.end_to_end.dvc_project import Project


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, finished_project: Path) -> Project:
    """A project that trained tiny nets and compared settings on all cars there are."""
    return Project.copy_of(finished_project, tmp_path_factory.mktemp("app") / "project")


@pytest.mark.slow
@pytest.mark.parametrize("split", ["oof", "holdout"])
def test_images_score_under_any_setting_what_the_ablation_says(
    trained: Project, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.folder)
    params, done = read_params(), []
    images = workspace.training_images(params)
    stored = scoring_groups(params, images.ids(), workspace.read_fold_by_car(), split)
    rows = rows_of_split(page_parts.read_report_table("ablation.csv"), split)
    for _, row in rows.iloc[:: max(1, len(rows) // 4)].iterrows():
        scored = score_images(stored, setting_of(row.to_dict()), images, done.append)
        assert scored["dice"].mean() == pytest.approx(row["dice"], abs=1e-8)
        assert len(scored) == row["images"]
    assert max(done) == 1.0
    now = rows[rows["current"]].iloc[0].to_dict()
    scored = score_images(stored, setting_of(now), images, done.append).set_index("image_id")
    known = rows_of_split(page_parts.read_report_table("image_disagreement.csv"), split).set_index("image_id")
    pd.testing.assert_series_equal(scored["dice"].sort_index(), known["dice"].sort_index(), atol=1e-8)


@pytest.fixture(scope="module")
def served(trained: Project) -> Iterator[str]:
    """The address of the page, served as users serve it."""
    port = free_port()
    process = trained.start("carvana", "app", "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_up(address))
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in trained.log.read_text()
    finally:
        process.kill()


def is_up(address: str) -> bool:
    try:
        return bool(requests.get(f"{address}/_stcore/health", timeout=5).ok)
    except requests.ConnectionError:
        return False


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "It never came so far."
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; a test that asks for it is skipped without one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        # Without its own sandbox it runs as root, in a container, too.
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Visit:
    """Somebody at the page, on a screen so wide."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 600)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked: set[str] = set()
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.on("websocket", lambda socket: self.asked.add(socket.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.address = address

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def go(self, name: str) -> None:
        """Open a page and wait until it is drawn."""
        self.page.goto(f"{self.address}/{name}")
        self.page.get_by_role("heading", level=1).wait_for()
        self.settle()

    def settle(self) -> None:
        """Wait until the page is drawn whole."""
        launch = "document.querySelector('[data-testid=stApp]')"
        self.page.wait_for_timeout(300)  # until the server has heard
        self.page.wait_for_function(f"() => {launch}?.getAttribute('data-test-script-state') === 'notRunning'")
        self.page.wait_for_timeout(300)

    @property
    def text(self) -> str:
        return str(self.page.locator("[data-testid=stMain]").inner_text())

    def source(self, picture: str) -> str:
        return str(self.page.locator(f"img.{picture}").get_attribute("src"))

    def wait_for_another(self, picture: str, than: str) -> None:
        self.page.wait_for_function(
            """([name, old]) => {
                const within = (root) => root.querySelector(`img.${name}`)
                    ?? [...root.querySelectorAll("*")].map((e) => e.shadowRoot && within(e.shadowRoot)).find(Boolean);
                const picture = within(document);
                return picture && picture.getAttribute("src") !== old;
            }""",
            arg=[picture, than],
        )

    def upload(self, name: str, data: bytes) -> None:
        file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        self.page.locator("input[type=file]").set_input_files(file)

    def download(self, label: str) -> bytes:
        with self.page.expect_download() as caught:
            self.page.get_by_role("button", name=label, exact=True).click()
        return Path(caught.value.path()).read_bytes()


@pytest.fixture
def visit(browser: Any, served: str) -> Iterator[Visit]:
    with Visit(browser, served) as visit:
        yield visit
        assert not visit.faults


@pytest.fixture
def photograph(tiny_sample: Path) -> bytes:
    with zipfile.ZipFile(tiny_sample / "test.zip") as pictures:
        return pictures.read(next(name for name in pictures.namelist() if name.endswith("_05.jpg")))


@pytest.mark.slow
class TestInABrowser:
    def test_a_picture_its_threshold_and_its_mask(
        self, visit: Visit, trained: Project, photograph: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        visit.go("")
        before = visit.source("image")
        visit.upload("my car.jpg", photograph)
        visit.wait_for_another("image", before)
        visit.settle()
        old = visit.source("layer")
        visit.page.get_by_role("slider", name="Threshold").press("ArrowLeft")
        visit.wait_for_another("layer", old)
        visit.settle()
        files = {label: visit.download(label) for label in ("Mask", "Cut-out", "Run lengths")}

        monkeypatch.chdir(trained.folder)
        image_HWC = load_image(photograph, "my car.jpg")
        masker = Segmenter({"small/0": segmenter.load_predictor("small/0", ["identity", "hflip"], device="cpu")})
        mask_HW = masker.segment(masker.predict(image_HWC), EnsembleSettings(threshold=0.49))
        assert 0 < mask_HW.mean() < 1
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["Mask"]))), mask_HW * np.uint8(255))
        cutout = np.asarray(Image.open(io.BytesIO(files["Cut-out"])))
        assert np.array_equal(cutout[..., 3] == 255, mask_HW)
        assert np.array_equal(cutout[mask_HW][:, :3], image_HWC[mask_HW])
        ((name, runs),) = [tuple(row) for row in list(csv.reader(io.StringIO(files["Run lengths"].decode())))[1:]]
        assert name == "my car.jpg"
        assert np.array_equal(rle.decode(runs, *mask_HW.shape), mask_HW)

    @pytest.mark.parametrize("width", [1280, 390])
    def test_the_slider_follows_keys_and_pointer_and_stays_for_another_mask(
        self, browser: Any, served: str, width: int
    ) -> None:
        with Visit(browser, served, width) as visit:
            visit.go("")
            slider, frame = visit.page.locator(".frame input"), visit.page.locator(".frame")
            at = "frame => frame.style.getPropertyValue('--at')"
            slider.press("End")
            assert frame.evaluate(at) == "100%"
            box = frame.bounding_box()
            visit.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 40)
            visit.page.mouse.down()
            visit.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60, steps=4)
            visit.page.mouse.up()
            assert float(frame.evaluate(at).rstrip("%")) == pytest.approx(25, abs=3)
            if width < 600:
                visit.page.touchscreen.tap(box["x"] + box["width"] * 0.75, box["y"] + 40)
                assert float(frame.evaluate(at).rstrip("%")) == pytest.approx(75, abs=5)
            stood, old = frame.evaluate(at), visit.source("layer")
            visit.page.get_by_text("Probability", exact=True).click()
            visit.wait_for_another("layer", old)
            assert frame.evaluate(at) == stood

    def test_nets_and_folds_change_it_live(self, visit: Visit) -> None:
        visit.go("")
        assert visit.page.get_by_text("Merge", exact=True).count() == 0
        visit.page.get_by_role("button", name="1", exact=True).click()
        visit.page.get_by_text("Merge", exact=True).wait_for()
        visit.settle()
        assert "small/0" in visit.text
        assert "small/1" in visit.text
        old = visit.source("layer")
        visit.page.get_by_text("Disagreement", exact=True).click()
        visit.wait_for_another("layer", old)
        visit.settle()
        assert "disagreement between nets" in visit.text

    def test_upload_that_is_not_an_image(self, visit: Visit, trained: Project, photograph: bytes) -> None:
        visit.go("")
        visit.upload("truncated.jpg", photograph[: len(photograph) // 2])
        alert = visit.page.get_by_role("alert")
        alert.wait_for()
        assert "truncated.jpg: not a valid JPEG" in alert.inner_text()
        assert str(trained.folder) not in visit.page.content()

    def test_chart_and_table_filter_each_other(self, visit: Visit, trained: Project) -> None:
        rows = rows_of_split(read_table(trained.folder / "reports/ablation.csv"), "oof")
        alike = rows[rows["views"] == rows.loc[rows["current"], "views"].item()]
        another = 1 if alike.nlargest(1, "dice")["current"].item() else 0
        visit.go("ablation")
        images = visit.page.locator("[data-testid=stImage] img")
        wait_for(lambda: images.count() == 8)  # two figures of two pictures for each of two cars
        first = images.first.get_attribute("src")
        chart = visit.page.locator("[data-testid=stVegaLiteChart]")
        points = chart.locator("path[aria-roledescription=point][aria-label*='kind']")
        points.first.click()  # the current setting: its ring is in nobody's way
        visit.page.get_by_text("at the selected points").wait_for()
        visit.settle()
        table = visit.page.locator("[data-testid=stDataFrame]")
        table.scroll_into_view_if_needed()
        table.click(position={"x": 17, "y": 35 * (1 + another) + 17})
        visit.page.get_by_text("Selected setting").wait_for()
        chart.get_by_text("selected").first.wait_for()
        wait_for(lambda: images.count() == 8 and images.first.get_attribute("src") != first)
        visit.settle()
        visit.page.get_by_role("button", name="Show all").click()
        visit.page.get_by_text("at the selected points").wait_for(state="detached")
        visit.page.get_by_text("Held-out cars", exact=True).click()
        visit.page.get_by_text("Cars that no net trained on").wait_for()

    @pytest.mark.parametrize("width", [1280, 390])
    def test_every_page_fits_and_asks_nobody_else(
        self, browser: Any, served: str, trained: Project, width: int
    ) -> None:
        with Visit(browser, served, width) as visit:
            for name in ("", "ablation", "submissions"):
                visit.go(name)
                wide = visit.page.locator("[data-testid=stMain]").evaluate("e => [e.scrollWidth, e.clientWidth]")
                assert wide[0] <= wide[1]
                assert str(trained.folder) not in visit.page.content()
            own = (served, served.replace("http", "ws", 1), f"blob:{served}", "data:")
            assert [url for url in visit.asked if not url.startswith(own)] == []
            assert not visit.faults

    def test_other_sites_get_nothing(self, served: str) -> None:
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        asked = f"{served}/_stcore/stream"
        evil = {"Origin": "http://evil.example:1", "Host": "evil.example:1"}
        assert requests.get(asked, headers=upgrade | {"Origin": served}, timeout=10, stream=True).status_code == 101
        assert requests.get(asked, headers=upgrade | evil, timeout=10).status_code == 403
        upload = f"{served}/_stcore/upload_file/session/file"
        assert requests.put(upload, files={"file": b"x"}, timeout=10).status_code in (400, 403)
