"""The README's endpoint: an HTTP service behind the query interface, over loopback."""

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from advmoe.core import files
from advmoe.core.errors import UserError
from advmoe.threats.extraction import adhoc
from advmoe.threats.extraction.adhoc import ExtractionRequest

README = ROOT / "README.md"
RECIPE = {
    "extract.images": 20,
    "extract.noise": 10,
    "extract.recipe.epochs": 1,
    "extract.steps": 1,
    "extract.surrogates": {"same": {"kind": "cnn", "width": 2}},
    "extract.robust.steps": 1,
}


@dataclass
class Service:
    """The images that the service received, and the request from which on it is down."""

    images: list[list[list[list[int]]]] = field(default_factory=list)
    requests: int = 0
    down_from: int = 10**6
    reply: object = None


@pytest.fixture
def service(project: Path) -> Iterator[Service]:
    """A service that knows three colours of grey by the brightness of the first pixel, and the README's file for it."""
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.requests += 1
            images = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if state.requests >= state.down_from:
                self.send_error(503)
                return
            state.images += images
            brightness = torch.tensor(images).float().mean(dim=(1, 2, 3)) / 255
            told = torch.softmax(torch.arange(10) * brightness[:, None], dim=1).tolist()
            content = json.dumps(told if state.reply is None else state.reply).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
            del format, arguments

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    (code,) = re.findall(r"```python\n(# endpoint.py\n.*?)```", README.read_text(), re.DOTALL)
    assert "http://127.0.0.1:8000" in code
    (project / "endpoint.py").write_text(code.replace("127.0.0.1:8000", f"127.0.0.1:{server.server_port}"))
    yield state
    server.shutdown()
    server.server_close()


def ask(budget: int = 30) -> dict[str, object]:
    """The quick question to the endpoint; its headline."""
    places = adhoc.run_request(
        ExtractionRequest("knockoff", budgets=(budget,), answers=("top1",), victims=("endpoint.py:factory",))
    )
    found = files.read_json(places.metrics)
    assert isinstance(found, dict)
    return found


@pytest.fixture(autouse=True)
def small(project: Path, edit: object) -> None:
    """Seconds rather than minutes."""
    del project
    assert callable(edit)
    edit(RECIPE)


def test_the_readmes_endpoint_is_asked_and_measured(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    stolen = ask()["endpoint"]
    assert isinstance(stolen, dict)
    numbers = stolen["top1"]["same"]["30"]
    assert 0 <= numbers["fidelity"] <= 1
    assert "transfer_asr" in numbers or numbers["victim_acc_under_transfer"] == 0
    assert "white_box_asr" not in numbers  # nothing to differentiate
    assert "robust_fidelity" not in numbers
    said = " ".join(capsys.readouterr().out.split())
    # the test images clean, with random signs, and crafted on the control and on the surrogate; and the noise
    most = 4 * 20 + 10
    assert f"endpoint: the evaluation sends up to {most} queries in addition to the budget" in said
    assert 30 + 3 * 20 + 10 <= len(service.images) <= 30 + most
    assert f"endpoint: {len(service.images)} answers" in said
    assert said.index("the evaluation sends") < said.index("answers, evaluation included")


@pytest.mark.parametrize(
    ("down_from", "answered"),
    [(1, 0), (2, 30), (3, 30 + 20), (4, 30 + 20 + 10)],
    ids=["at once", "after the thief", "after the test images", "after the noise"],
)
def test_what_was_paid_for_before_the_service_went_down_is_not_paid_for_again(
    project: Path, service: Service, down_from: int, answered: int
) -> None:
    """First the thief's 30 queries, which are on disk before the exam asks about 20 test images and 10 of noise."""
    service.down_from = down_from
    with pytest.raises(UserError, match=r"endpoint\.py:factory raised HTTPError: HTTP Error 503"):
        ask()
    paid = len(service.images)
    assert paid == answered
    assert len(list(project.glob("runs/*/models/endpoint-top1-seed-0.safetensors"))) == (down_from > 1)
    service.down_from = 10**6
    ask()
    seen = [json.dumps(image) for image in service.images]
    assert len(seen) > paid
    assert len(seen) == len(set(seen)), "an image was paid for twice"
    before = len(seen)
    ask()
    assert len(service.images) == before


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ([[0.5] * 2] * 30, "must return 30 x 10 numbers for 30 images, not (30, 2)"),
        ([[float("nan")] * 10] * 30, "must return probabilities"),
        ([[5.0] * 10] * 30, "must return probabilities"),
        ([17] * 30, "returned class 17, but the data has 10 classes"),
        ("sorry", "raised "),
    ],
    ids=["too few classes", "NaN", "logits", "a class that is not there", "no numbers"],
)
def test_a_service_that_answers_nonsense(service: Service, reply: object, expected: str) -> None:
    service.reply = reply
    with pytest.raises(UserError) as error:
        ask()
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_a_service_that_tells_classes_only(service: Service) -> None:
    service.reply = [3] * 30  # the thief's answers, and too many for the exam's twenty test images
    with pytest.raises(UserError, match="must return 20 x 10 numbers for 20 images"):
        ask()
    assert service.requests == 2
