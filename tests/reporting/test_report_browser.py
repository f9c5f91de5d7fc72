"""The page in a real browser: it is drawn, says nothing on the console and asks nobody for anything."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from test_report import made_up, page_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH")
OWN = "not an origin"
QUIET = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
NOBODY = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"  # a test asks nobody either


class Visit:
    """What a browser did with a page."""

    def __init__(self, folder: Path, page: str, *options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file, self.picture, log = folder / "page.html", folder / "page.png", folder / "net.json"
        file.write_text(page)
        assert BROWSER is not None
        command = [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            *QUIET,
            f"--user-data-dir={folder / 'profile'}",
        ]
        command += [NOBODY, "--enable-logging=stderr", f"--log-net-log={log}", "--window-size=1280,900", *options]
        ran = subprocess.run(
            [*command, f"--screenshot={self.picture}", file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        self.console = [line for line in ran.stderr.splitlines() if "CONSOLE" in line]
        self.requests = self._requests(log)

    @staticmethod
    def _requests(log: Path) -> list[str]:
        """Addresses on the network that the page asked for; the browser's own business has no origin."""
        events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
        asked = (event["url"] for event in events if event.get("initiator", OWN) != OWN)
        return [address for address in asked if address.startswith(("http:", "https:"))]

    def colours(self) -> list[tuple[int, tuple[int, ...]]]:
        """How often each colour occurs in the screenshot."""
        found = Image.open(self.picture).convert("RGB").getcolors(1 << 24)
        assert found
        return sorted(found, reverse=True)  # type: ignore[arg-type]


def test_the_page_is_drawn_in_silence(tmp_path: Path) -> None:
    visit = Visit(tmp_path, page_of(made_up()))
    assert visit.console == []
    assert visit.requests == []
    assert visit.colours()[0][1] == (255, 255, 255)  # light, as nobody asked for dark
    assert len(visit.colours()) > 50


def test_the_page_is_dark_for_who_wants_it_dark(tmp_path: Path) -> None:
    visit = Visit(tmp_path, page_of(made_up()), "--blink-settings=preferredColorScheme=0")
    assert sum(visit.colours()[0][1]) < 120
    assert len(visit.colours()) > 50


def test_a_page_that_does_ask_would_be_noticed(tmp_path: Path) -> None:
    """The two silences above mean something."""
    loud = '<img src="http://127.0.0.1:9/x.png"><script>console.error("loud")</script>'
    visit = Visit(tmp_path, loud)
    assert any("loud" in line for line in visit.console)
    assert "http://127.0.0.1:9/x.png" in visit.requests
