"""The page in a real browser: it renders, without console messages or requests."""

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
NO_NETWORK = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


class Visit:
    """A visit of a browser to a page."""

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
        command += [NO_NETWORK, "--enable-logging=stderr", f"--log-net-log={log}", "--window-size=1280,900", *options]
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
        """Network addresses that the page requested; requests of the browser itself have no origin."""
        events = (event.get("params", {}) for event in json.loads(log.read_text())["events"])
        asked = (event["url"] for event in events if event.get("initiator", OWN) != OWN)
        return [address for address in asked if address.startswith(("http:", "https:"))]

    def colours(self) -> list[tuple[int, tuple[int, ...]]]:
        """How often each colour occurs in the screenshot."""
        found = Image.open(self.picture).convert("RGB").getcolors(1 << 24)
        assert found
        return sorted(found, reverse=True)  # type: ignore[arg-type]


def test_the_page_renders_without_messages_and_requests(tmp_path: Path) -> None:
    visit = Visit(tmp_path, page_of(made_up()))
    assert visit.console == []
    assert visit.requests == []
    assert visit.colours()[0][1] == (255, 255, 255)  # light by default
    assert len(visit.colours()) > 50


def test_the_page_follows_the_dark_colour_scheme(tmp_path: Path) -> None:
    visit = Visit(tmp_path, page_of(made_up()), "--blink-settings=preferredColorScheme=0")
    assert sum(visit.colours()[0][1]) < 120
    assert len(visit.colours()) > 50


def test_messages_and_requests_are_detected(tmp_path: Path) -> None:
    """The checks above can fail."""
    loud = '<img src="http://127.0.0.1:9/x.png"><script>console.error("loud")</script>'
    visit = Visit(tmp_path, loud)
    assert any("loud" in line for line in visit.console)
    assert "http://127.0.0.1:9/x.png" in visit.requests
