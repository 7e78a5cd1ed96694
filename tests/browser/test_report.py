"""The report in a real browser: every image loads, and nothing is wider than the window."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hive_vision.cli import main
from tests.reporting.run_folders import demo_folder, maps_folder, png, pretrain_run, study_folder

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no Chromium on the PATH (looked for {', '.join(NAMES)})"
)

# A frame is as narrow as it is told to be; a window of the browser is not (500 pixels at least).
FRAME = """<!DOCTYPE html><body style="margin:0"><iframe id="page" src="{page}"
style="border:0;width:{width}px;height:800px"></iframe><pre id="found"></pre><script>
window.addEventListener("message", (e) => document.getElementById("found").textContent = e.data);
</script></body>"""

MEASURE = """<script>
window.addEventListener("load", () => {
  const root = document.documentElement;
  const images = [...document.images].map((i) => i.complete && i.naturalWidth > 0);
  const outside = [...document.querySelectorAll("h1, h2, h3, p, li, figure, .scroll")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.textContent);
  const hidden = [...document.querySelectorAll(".pairs td")]
    .filter((e) => e.getBoundingClientRect().right > innerWidth).map((e) => e.textContent);
  const widths = [...document.images].map((i) => i.getBoundingClientRect().width);
  parent.postMessage(JSON.stringify(
    {scroll: root.scrollWidth, window: innerWidth, images, outside, hidden, widths}), "*");
});
</script></body>"""


def measured(page: Path, width: int) -> dict[str, Any]:
    """Lay a copy of a page out in a window of a width; give what a script in it sees."""
    text = page.read_text(encoding="utf-8")
    text, policies = re.subn(r"<meta http-equiv=[^>]*>\n", "", text)  # it forbids scripts
    assert policies == 1
    copy = page.with_name("measured.html")
    copy.write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frame = page.with_name("frame.html")
    frame.write_text(FRAME.format(page=copy.name, width=width), encoding="utf-8")
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--window-size=1400,900"]
    command += ["--virtual-time-budget=10000", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r'<pre id="found">([^<]+)</pre>', shown)
    assert match, shown[-2000:]
    found: dict[str, Any] = json.loads(match[1].replace("&quot;", '"'))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    demo = demo_folder(folder / "a-demo-with-quite-a-long-name", with_maps=True)
    study = study_folder(folder / "study")
    main(["report", str(demo), str(study), f"output={folder / 'out'}"])
    return folder / "out" / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_window(page: Path, width: int) -> None:
    found = measured(page, width)
    assert found["window"] == width
    assert found["scroll"] <= width
    assert found["outside"] == []
    assert len(found["images"]) >= 4
    assert all(found["images"])


def test_a_telephone_shows_values_beside_long_keys_and_large_figures_at_their_size(
    tmp_path: Path,
) -> None:
    keys = {"miniature": {"foundations": {"language_model_learning_rate": 0.002}}}
    run = pretrain_run(tmp_path / "hive", data={"train": "a/long/way/to/captions"}, **keys)
    maps = maps_folder(tmp_path / "maps")
    (maps / "gradients-0.png").write_bytes(png(1400, 900))
    main(["report", str(run), str(maps), f"output={tmp_path / 'out'}"])
    found = measured(tmp_path / "out" / "report.html", 390)
    assert found["scroll"] <= 390
    assert found["hidden"] == []
    assert max(found["widths"]) > 390


def test_the_measure_sees_what_is_wrong(page: Path, tmp_path: Path) -> None:
    wide = '<p style="min-width: 2000px">wide</p><img src="data:image/png;base64,AAAA"></main>'
    broken = tmp_path / "report.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("</main>", wide), encoding="utf-8")
    found = measured(broken, 390)
    assert found["scroll"] >= 2000
    assert found["outside"] == ["wide"]
    assert not all(found["images"])
