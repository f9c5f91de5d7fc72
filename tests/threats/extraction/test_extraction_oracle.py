"""The oracle and its victims: query budget, answer modes, checks of answers, and the query cache."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advmoe.core import paths, user_code
from advmoe.core.errors import UserError
from advmoe.data import dataset
from advmoe.data.dataset import DatasetInfo, image_digests
from advmoe.models import classifiers
from advmoe.models.classifiers import BackboneSettings, PlainArchitecture
from advmoe.models.mixture import MixtureOfExperts
from advmoe.threats.extraction import victims
from advmoe.threats.extraction.oracle import Oracle, format_answers
from advmoe.threats.extraction.query_cache import QueryCache
from advmoe.threats.extraction.transfer_set import query

CLASSES = 3
FACTS = DatasetInfo(channels=1, height=4, width=4, class_names=("a", "b", "c"), mean=(0.5,), std=(0.3,))
THIRDS = torch.tensor([[0.123456, 0.654321, 0.222223], [0.9, 0.0999, 0.0001]])
FUNCTION = """
from pathlib import Path

import torch

HERE = Path(__file__).parent


def factory():
    def answer(images):
        # image by image, as a service would that charges for each
        told = []
        for image in images:
            with (HERE / "bill").open("a") as bill:
                bill.write("1\\n")
            if (HERE / "broken").exists() and len((HERE / "bill").read_text().split()) >= 250:
                raise TimeoutError("the service did not answer")
            told.append(torch.tensor([1.0, 2.0, 1.0 + float(image[0, 0, 0])]))
        return torch.softmax(torch.stack(told), dim=1)

    return answer
"""


class RecordingVictim:
    """A victim that records its queries; its answers differ between images."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        self.batches.append(images_NCHW)
        return torch.softmax(images_NCHW.flatten(1)[:, :CLASSES].float() / 50, dim=1)


class Linear(nn.Module):
    """Flatten and multiply: logits = W x + b."""

    def __init__(self, weight_KP: Tensor, bias_K: Tensor) -> None:
        super().__init__()
        self.weight_KP, self.bias_K = nn.Parameter(weight_KP), nn.Parameter(bias_K)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return images_BCHW.flatten(1) @ self.weight_KP.T + self.bias_K


def make_images(count: int, side: int = 4, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, side, side), generator=stream, dtype=torch.uint8)


def write_code(folder: Path, text: str, name: str = "endpoint.py") -> str:
    (folder / name).write_text(text)
    return f"{folder / name}:factory"


def bill(folder: Path) -> int:
    """Returns the number of images that the user's function received."""
    return len((folder / "bill").read_text().split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder; the test runs inside it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the budget


@pytest.mark.parametrize("parts", [[5], [2, 3], [1, 1, 1, 1, 1]], ids=["at once", "in two", "one by one"])
def test_exactly_the_budget_is_answered_and_one_more_is_refused_without_a_query(parts: list[int]) -> None:
    witness = RecordingVictim()
    oracle = Oracle(witness, "soft", 5)
    for images in torch.split(make_images(5), parts):
        oracle.query(images)
    assert (oracle.used, oracle.remaining) == (5, 0)
    before = len(witness.batches), oracle.used, list(oracle.query_log)
    with pytest.raises(UserError, match="the budget of 5 queries does not cover 1 more: 0 are left"):
        oracle.query(make_images(1, seed=1))
    assert (len(witness.batches), oracle.used, oracle.query_log) == before


def test_a_batch_that_overdraws_is_refused_as_a_whole() -> None:
    witness = RecordingVictim()
    oracle = Oracle(witness, "soft", 5)
    oracle.query(make_images(3))
    with pytest.raises(UserError, match="does not cover 3 more: 2 are left"):
        oracle.query(make_images(3))
    assert (len(witness.batches), oracle.used) == (1, 3)
    oracle.query(make_images(2))  # what is left may still be spent
    assert oracle.remaining == 0


def test_every_image_is_a_query_whatever_the_batch_size() -> None:
    images = make_images(6)
    whole, single = Oracle(RecordingVictim(), "soft", 6), Oracle(RecordingVictim(), "soft", 6)
    together = whole.query(images)
    alone = torch.cat([single.query(image) for image in torch.split(images, 1)])
    assert torch.equal(together, alone)
    assert (whole.used, whole.query_log) == (single.used, single.query_log) == (6, image_digests(images))


def test_an_image_queried_twice_counts_twice() -> None:
    images = make_images(2)
    oracle = Oracle(RecordingVictim(), "soft", 6)
    oracle.query(images[[0, 0, 1]])
    oracle.query(images)
    assert (oracle.used, oracle.remaining) == (5, 1)
    assert oracle.query_log == image_digests(images[[0, 0, 1, 0, 1]])


def test_a_transfer_set_counts_queries() -> None:
    oracle = Oracle(RecordingVictim(), "soft", 9)
    first, second = query(oracle, make_images(4)), query(oracle, make_images(5))
    assert first.queries.tolist() == [1, 2, 3, 4]
    assert second.queries.tolist() == [5, 6, 7, 8, 9]


# ---- answer modes


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("soft", THIRDS.tolist()),
        ("top1", [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]),
        ("rounded-1", [[0.1, 0.7, 0.2], [0.9, 0.1, 0.0]]),
        ("rounded-3", [[0.123, 0.654, 0.222], [0.9, 0.1, 0.0]]),
    ],
    ids=["soft", "top1", "rounded-1", "rounded-3"],
)
def test_the_answer_mode_is_all_that_the_attacker_sees(mode: str, expected: list[list[float]]) -> None:
    oracle = Oracle(lambda _: THIRDS, mode, 2)
    told = oracle.query(make_images(2))
    assert torch.allclose(told, torch.tensor(expected), atol=1e-6)
    assert torch.equal(told, format_answers(THIRDS, mode))


def test_a_network_answers_with_the_softmax_of_its_logits_at_temperature_1() -> None:
    images = make_images(5)
    model = Linear(torch.randn(CLASSES, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 1.0, -1.0]))
    told = Oracle(victims._network_victim("linear", "id", model, CLASSES).query, "soft", 5).query(images)
    with torch.no_grad():
        logits = model(images.float() / 255)
    assert torch.allclose(told, logits.softmax(1), atol=1e-5)
    assert torch.allclose(told.sum(1), torch.ones(5), atol=1e-6)
    assert not torch.allclose(told, logits, atol=0.1)


def test_soft_answers_of_a_linear_victim_reveal_its_weights() -> None:
    """Equation solving (Tramer et al. 2016, section 4.1): logarithms of ratios are linear in the pixels."""
    stream = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(CLASSES, 16, generator=stream), torch.randn(CLASSES, generator=stream)
    images = make_images(40)
    oracle = Oracle(victims._network_victim("linear", "id", Linear(weight, bias), CLASSES).query, "soft", 40)
    logs = oracle.query(images).double().log()
    ratios = logs[:, 1:] - logs[:, :1]
    known = torch.cat([images.flatten(1).double() / 255, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    solved = torch.linalg.lstsq(known, ratios).solution
    expected = torch.cat([weight[1:] - weight[:1], (bias[1:] - bias[:1])[:, None]], dim=1).T.double()
    assert torch.allclose(solved, expected, atol=1e-4)


# ---- checked answers


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ([0.2, 0.8], "must return a tensor, not list"),
        (torch.full((2, 4), 0.25), "must return 2 x 3 numbers for 2 images, not \\(2, 4\\)"),
        (torch.full((1, 3), 1 / 3), "must return 2 x 3 numbers for 2 images, not \\(1, 3\\)"),
        (torch.tensor([0.0, 1.0]), "must return 2 x 3 numbers for 2 images, not \\(2,\\)"),
        (torch.tensor([[torch.nan, 0.5, 0.5], [1.0, 0.0, 0.0]]), "must return probabilities"),
        (torch.tensor([[torch.inf, 0.5, 0.5], [1.0, 0.0, 0.0]]), "must return probabilities"),
        (torch.tensor([[-0.5, 1.0, 0.5], [1.0, 0.0, 0.0]]), "must return probabilities"),
        (torch.tensor([[2.0, 1.0, 4.0], [1.0, 0.0, 0.0]]), "must return probabilities"),
        (torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.4, 0.0]]), "must return probabilities"),
        (torch.tensor([0, 3]), "returned class 3, but the data has 3 classes"),
        (torch.tensor([-1, 2]), "returned class -1, but the data has 3 classes"),
    ],
    ids=["list", "classes", "images", "numbers", "nan", "inf", "negative", "logits", "sum", "class-3", "class-minus-1"],
)
def test_an_invalid_answer_is_refused_in_one_sentence(told: object, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused:
        victims.check_answers(told, 2, CLASSES, "endpoint.py:factory")
    assert str(refused.value).startswith("endpoint.py:factory: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("told", "named"), [([-1, 2, 0], -1), ([2, 0, -1], -1), ([2, 7, -1], 7), ([0, 3, 9], 3), ([2, -5, -1], -5)], ids=str
)
def test_the_refusal_of_unknown_classes_names_the_first_one(told: list[int], named: int) -> None:
    with pytest.raises(UserError, match=f"returned class {named}, but the data has 3 classes$"):
        victims.check_answers(torch.tensor(told), 3, CLASSES, "endpoint.py:factory")


def test_log_probabilities_and_logits_of_a_network_are_refused() -> None:
    """What an endpoint without a softmax would return."""
    logits = Linear(torch.eye(CLASSES, 16), torch.zeros(CLASSES))(make_images(4).float() / 255)
    for told in (logits, logits.log_softmax(1)):
        with pytest.raises(UserError, match="probabilities"):
            victims.check_answers(told, 4, CLASSES, "endpoint")


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8], ids=["int64", "int32", "uint8"])
def test_classes_alone_become_one_hot_answers(kind: torch.dtype) -> None:
    told = victims.check_answers(torch.tensor([2, 0], dtype=kind), 2, CLASSES, "endpoint")
    assert told.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert told.dtype == torch.float32


def test_rounded_probabilities_and_gradients_of_an_endpoint_are_taken() -> None:
    told = torch.tensor([[0.3334, 0.3333, 0.3332]], dtype=torch.float64, requires_grad=True)
    found = victims.check_answers(told, 1, CLASSES, "endpoint")
    assert not found.requires_grad
    assert found.dtype == torch.float32


# ---- eval mode, no gradients

LEFT_IN_TRAIN_MODE = """
import torch
from torch import nn


def factory():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 3)
    )
    return network.train()
"""


def test_a_victim_left_in_train_mode_answers_in_eval_mode(folder: Path) -> None:
    victim = victims.load(write_code(folder, LEFT_IN_TRAIN_MODE), None, FACTS)
    assert victim.model is not None
    before = {name: tensor.clone() for name, tensor in victim.model.state_dict().items()}
    images = make_images(7)
    together = victim.query(images)
    alone = torch.cat([victim.query(image) for image in torch.split(images, 1)])
    # neither dropout nor the statistics of a batch have a say
    assert torch.equal(together, alone)
    assert torch.equal(together, victim.query(images))
    with torch.no_grad():
        assert torch.allclose(together, victim.model.eval()(images.float() / 255).softmax(1), atol=1e-5)
    assert {
        name for name, tensor in victim.model.state_dict().items() if not torch.equal(tensor, before[name])
    } == set()


def test_a_network_set_to_train_mode_later_still_answers_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, CLASSES))
    victim = victims._network_victim("network", "id", model, CLASSES)
    images = make_images(5)
    expected = victim.query(images)
    model.train()
    batches = int(model[1].num_batches_tracked)  # type: ignore[arg-type]
    assert torch.equal(victim.query(images), expected)
    assert int(model[1].num_batches_tracked) == batches  # type: ignore[arg-type]


def test_answers_carry_no_gradient_and_leave_none_in_the_victim() -> None:
    model = Linear(torch.ones(CLASSES, 16), torch.zeros(CLASSES))
    told = Oracle(victims._network_victim("linear", "id", model, CLASSES).query, "soft", 3).query(make_images(3))
    assert not told.requires_grad
    assert told.grad_fn is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


# ---- the query cache


def test_cached_answers_are_read_by_another_process(tmp_path: Path) -> None:
    images, answers = make_images(3), THIRDS[[0, 1, 0]]
    QueryCache(tmp_path).add(image_digests(images), answers)
    QueryCache(tmp_path).add(image_digests(make_images(1, seed=5)), THIRDS[:1])
    again = QueryCache(tmp_path).lookup([*image_digests(images), *image_digests(make_images(1, seed=9))])
    assert again[-1] is None
    assert torch.equal(torch.stack([answer for answer in again if answer is not None]), answers)


@pytest.mark.parametrize("harm", ["cut", "text", "empty"], ids=str)
def test_a_damaged_cache_file_is_named(tmp_path: Path, harm: str) -> None:
    QueryCache(tmp_path).add(image_digests(make_images(3)), THIRDS[[0, 1, 0]])
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes({"cut": file.read_bytes()[:-8], "text": b"not a tensor", "empty": b""}[harm])
    with pytest.raises(UserError, match="damaged; delete it") as refused:
        QueryCache(tmp_path)
    assert str(refused.value).startswith(str(file))


def test_a_file_without_digests_is_damaged_too(tmp_path: Path) -> None:
    from safetensors.torch import save

    (tmp_path / "foreign.safetensors").write_bytes(save({"answers": THIRDS}))
    with pytest.raises(UserError, match=r"foreign\.safetensors: damaged"):
        QueryCache(tmp_path)


def test_digests_tell_images_apart_by_their_bytes_alone() -> None:
    images = make_images(2)
    twice = torch.cat([images, images.clone()])
    assert image_digests(twice)[:2] == image_digests(twice)[2:]
    changed = images.clone()
    changed[0, 0, 0, 0] += 1
    assert image_digests(changed)[0] != image_digests(images)[0]
    assert image_digests(images.contiguous(memory_format=torch.channels_last)) == image_digests(images)


# ---- a user's function


def test_answers_cached_before_a_failure_are_reused_after_it(folder: Path) -> None:
    """The second batch of 200 fails in its middle: the first is on disk and never sent again."""
    reference, images = write_code(folder, FUNCTION), make_images(300)
    (folder / "broken").touch()
    oracle = Oracle(victims.load(reference, None, FACTS).query, "soft", 300)
    with pytest.raises(UserError, match="the service did not answer"):
        oracle.query(images)
    assert bill(folder) == 250
    (folder / "broken").unlink()
    again = Oracle(victims.load(reference, None, FACTS).query, "soft", 300)
    told = again.query(images)
    assert bill(folder) == 250 + 100  # only those of the batch that failed
    assert again.used == 300  # cached answers count against the attacker's budget
    levels = torch.stack([torch.ones(300), torch.full((300,), 2.0), 1 + images[:, 0, 0, 0].float()], dim=1)
    assert torch.allclose(told, levels.softmax(1))
    assert torch.equal(victims.load(reference, None, FACTS).query(images.flip(0)), told.flip(0))
    assert bill(folder) == 350


def test_an_image_twice_in_one_batch_is_sent_once_and_answered_twice(folder: Path) -> None:
    victim = victims.load(write_code(folder, FUNCTION), None, FACTS)
    images = make_images(2)
    told = victim.query(images[[0, 1, 0, 0]])
    assert bill(folder) == 2
    assert torch.equal(told[0], told[2])
    assert torch.equal(told, victim.query(images)[[0, 1, 0, 0]])


def test_another_version_of_the_file_does_not_use_the_old_cache(folder: Path) -> None:
    images = make_images(2)
    first = victims.load(write_code(folder, FUNCTION), None, FACTS)
    first.query(images)
    second = victims.load(write_code(folder, FUNCTION.replace("2.0", "3.0")), None, FACTS)
    second.query(images)
    assert bill(folder) == 4
    assert first.identity != second.identity


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("raise TimeoutError('slow')", "raised TimeoutError: slow"),
        ("raise RuntimeError('line one\\nline two')", "raised RuntimeError: line one"),
        ("return images.flatten(1)[:, :3].float()", "must return probabilities"),
        ("return None", "must return a tensor, not NoneType"),
    ],
    ids=["timeout", "error", "logits", "nothing"],
)
def test_an_error_in_a_function_is_one_sentence_and_nothing_is_cached(folder: Path, body: str, words: str) -> None:
    code = f"def factory():\n    def answer(images):\n        {body}\n    return answer\n"
    reference = write_code(folder, code)
    oracle = Oracle(victims.load(reference, None, FACTS).query, "soft", 4)
    with pytest.raises(UserError, match=words) as refused:
        oracle.query(make_images(4))
    assert "\n" not in str(refused.value)
    assert reference in str(refused.value)
    assert oracle.used == 0
    assert list(Path().rglob("*.safetensors")) == []


def test_a_function_receives_a_copy_of_the_images(folder: Path) -> None:
    code = "import torch\n\n\ndef factory():\n    def answer(images):\n        images.zero_()\n"
    code += "        return torch.zeros(len(images), dtype=torch.int64)\n    return answer\n"
    images = make_images(3)
    before = images.clone()
    Oracle(victims.load(write_code(folder, code), None, FACTS).query, "top1", 3).query(images)
    assert torch.equal(images, before)


class Service(BaseHTTPRequestHandler):
    """JSON in, JSON out: the brighter an image, the surer of the last class."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = torch.tensor(body["images"], dtype=torch.float32)
        light = images.flatten(1).mean(dim=1) / 255
        told = torch.stack([0.5 * (1 - light), 0.5 * (1 - light), light], dim=1)
        content = json.dumps({"probabilities": told.tolist()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        del format, args


@pytest.fixture
def service() -> Iterator[str]:
    """A classifier behind HTTP on this machine."""
    server = HTTPServer(("127.0.0.1", 0), Service)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()
    thread.join()


CLIENT = """
import json
from urllib import request

import torch


def factory():
    def answer(images):
        body = json.dumps({{"images": images.tolist()}}).encode()
        with request.urlopen(request.Request("{url}", data=body), timeout=5) as reply:
            return torch.tensor(json.load(reply)["probabilities"])

    return answer
"""


def test_an_endpoint_behind_http_is_a_victim_like_any_other(folder: Path, service: str) -> None:
    victim = victims.load(write_code(folder, CLIENT.format(url=service)), None, FACTS)
    images = make_images(6)
    light = images.flatten(1).float().mean(1) / 255
    told = Oracle(victim.query, "soft", 6).query(images)
    assert torch.allclose(told[:, 2], light, atol=1e-5)
    assert (victim.name, victim.model) == ("endpoint", None)


def test_an_unreachable_endpoint_is_one_sentence(folder: Path, service: str) -> None:
    nowhere = service.replace("127.0.0.1", "127.0.0.1:1/no")  # not a port that anybody listens on
    victim = victims.load(write_code(folder, CLIENT.format(url=nowhere)), None, FACTS)
    with pytest.raises(UserError, match=r"endpoint\.py:factory raised ") as refused:
        victim.query(make_images(1))
    assert "\n" not in str(refused.value)


# ---- victims by name


def test_the_mixture_an_expert_a_baseline_and_a_file_are_loaded_by_name(project: Path) -> None:
    del project
    data = dataset.load(paths.DATASET)
    architecture = PlainArchitecture(kind="plain", backbone=BackboneSettings(kind="cnn", width=2))
    for seed, path in enumerate(
        (paths.artifact("pretrain", "pgd-1"), paths.artifact("baseline", "tiny"), Path("models/mine.safetensors"))
    ):
        model = classifiers.build(architecture, data.facts, seed)
        classifiers.save(path, model, architecture, data.facts, params={}, inputs={}, seed=0, metrics={}, seconds=0.0)
    names = ["mixture", "expert/pgd-1", "tiny", "models/mine.safetensors"]
    found = [victims.load(name, None, data.facts) for name in names]
    assert [victim.name for victim in found] == ["mixture", "expert/pgd-1", "tiny", "mine"]
    assert isinstance(found[0].model, MixtureOfExperts)
    assert len({victim.identity for victim in found}) == 4
    images = data["test"].images[:5]
    for victim in found:
        told = victim.query(images)
        assert torch.allclose(told.sum(1), torch.ones(5), atol=1e-5)
        assert victim.model is not None
        assert not victim.model.training


def test_a_mixture_of_probabilities_is_not_normalised_twice(project: Path) -> None:
    """Its output are log-probabilities: the softmax of the oracle gives them back as they were."""
    del project
    data = dataset.load(paths.DATASET)
    images = data["test"].images[:5]
    model = classifiers.load(paths.MIXTURE).model.eval()
    with torch.no_grad():
        expected = model(images.float() / 255).exp()
    assert torch.allclose(victims.load("mixture", None, data.facts).query(images), expected, atol=1e-5)


SEVEN = {"class_names": tuple("abcdefg")}
COLOUR = {"channels": 3, "mean": (0.5,) * 3, "std": (0.3,) * 3}


@pytest.mark.parametrize(
    ("name", "weights", "changes", "words"),
    [
        ("mixture", None, SEVEN, "mixture: has 10 classes, but the data has 7"),
        ("mixture", None, COLOUR, r"mixture: takes images of \(1, 8, 8\), but the data has \(3, 8, 8\)"),
        ("mixture", None, {"height": 9}, r"mixture: takes images of \(1, 8, 8\), but the data has \(1, 9, 8\)"),
        ("mixture", None, {"width": 7}, r"mixture: takes images of \(1, 8, 8\), but the data has \(1, 8, 7\)"),
        ("mixture", Path("weights.pt"), {}, "--weights: mixture has weights already; --weights is for --victim "),
        ("nobody", Path("weights.pt"), {}, r"--weights is for --victim path/to/file\.py:factory"),
        ("nobody", None, {}, "victim 'nobody': artifacts/baseline/nobody.safetensors does not exist"),
        ("expert/nobody", None, {}, "artifacts/pretrain/nobody.safetensors does not exist"),
        ("artifacts/prepare/dataset.safetensors", None, {}, "holds a dataset"),
        ("nowhere.py:factory", None, {}, "no such file nowhere.py"),
        ("number.py:factory", None, {}, "must return a network or a function of images, not int"),
        ("number.py:missing", None, {}, "has no function 'missing'"),
        ("function.py:factory", Path("weights.pt"), {}, "returns a function, which has no weights"),
    ],
    ids=[
        "class-count",
        "colour",
        "height",
        "width",
        "weights-of-mixture",
        "weights-of-nobody",
        "baseline",
        "expert",
        "dataset",
        "file",
        "number",
        "no-function",
        "weights-of-function",
    ],
)
def test_an_invalid_victim_is_refused_in_one_sentence(
    project: Path, name: str, weights: Path | None, changes: dict[str, Any], words: str
) -> None:
    write_code(project, "def factory():\n    return 3\n", "number.py")
    write_code(project, "def factory():\n    return lambda images: images\n", "function.py")
    facts = dataset.load(paths.DATASET).facts.model_copy(update=changes)
    with pytest.raises(UserError, match=words) as refused:
        victims.load(name, weights, facts)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": tuple("ab")}, "has 3 classes, but the data has 2"),
        ({"class_names": tuple("abcd")}, "outputs 3 classes, but labels go up to 3"),
        (COLOUR, r"cannot take images of shape \(3, 4, 4\)"),
        ({"height": 5}, r"cannot take images of shape \(1, 5, 4\)"),
    ],
    ids=["fewer classes", "more classes", "colour", "size"],
)
def test_an_external_network_for_other_images_is_refused_before_the_first_query(
    folder: Path, changes: dict[str, Any], words: str
) -> None:
    reference = write_code(folder, LEFT_IN_TRAIN_MODE)
    assert victims.load(reference, None, FACTS).model is not None
    with pytest.raises(UserError, match=words) as refused:
        victims.load(reference, None, FACTS.model_copy(update=changes))
    assert "\n" not in str(refused.value)


WITNESS = """
import torch
from torch import nn

SEEN = []


class Witness(nn.Module):
    def forward(self, images):
        SEEN.append((self.training, torch.is_grad_enabled(), images.clone()))
        return torch.zeros(len(images), 3)


def factory():
    return Witness()
"""


def test_an_external_network_is_checked_on_one_black_image_in_eval_mode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, modules = write_code(folder, WITNESS), list[Any]()
    real = user_code.load_function

    def watched(asked_for: str) -> Any:
        found = real(asked_for)
        modules.append(found.__globals__)
        return found

    monkeypatch.setattr(user_code, "load_function", watched)
    victims.load(reference, None, FACTS)
    (seen,) = [module["SEEN"] for module in modules]
    ((training, gradients, images),) = seen
    assert (training, gradients) == (False, False)
    assert torch.equal(images, torch.zeros(1, 1, 4, 4))
