"""User functions: every error becomes a UserError that names the file."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advmoe.attacks.ball import LInf
from advmoe.attacks.custom import Custom, custom
from advmoe.attacks.random_streams import ImageStreams
from advmoe.core import user_code
from advmoe.core.errors import UserError

FILE = "mine.py"
NAME = f"{FILE}:attack"
ATTACK = "def attack(model, images, labels, *, ball, draws, fooled=None):\n    "


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sentence(action: Callable[[], object]) -> str:
    """The message of the UserError that `action` raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        action()
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_a_function_is_found_and_called() -> None:
    Path(FILE).write_text("def double(number, *, and_add):\n    return 2 * number + and_add\n")
    function = user_code.load_function(f"{FILE}:double")
    assert user_code.call(f"{FILE}:double", function, 3, and_add=1) == 7


def test_a_file_may_lie_in_another_folder_and_define_classes() -> None:
    Path("deep").mkdir()
    lines = ["from __future__ import annotations", "from dataclasses import dataclass", "", "@dataclass"]
    Path("deep", FILE).write_text("\n".join([*lines, "class Point:", "    x: int = 3", ""]))
    assert user_code.load_function("deep/mine.py:Point")().x == 3


def test_two_files_of_the_same_name_are_separate_modules() -> None:
    for folder in ("left", "right"):
        Path(folder).mkdir()
        Path(folder, FILE).write_text(f"def where():\n    return {folder!r}\n")
    left, right = (user_code.load_function(f"{folder}/{FILE}:where") for folder in ("left", "right"))
    assert (left(), right()) == ("left", "right")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mine.py:attack", True),
        ("a/b.c/mine.py:attack_2", True),
        ("mine.py", False),
        ("mine:attack", False),
        ("mine.py:", False),
        ("mine.py:two words", False),
        ("mine.py:2nd", False),
        ("mine.safetensors", False),
        (":attack", False),
        ("", False),
    ],
)
def test_the_form_of_references(text: str, expected: bool) -> None:
    assert user_code.is_code_reference(text) is expected


@pytest.mark.parametrize("reference", ["mine.py", "mine.py:", "mine:attack", "mine.py:no name"])
@pytest.mark.parametrize("use", [user_code.load_function, user_code.file_digest])
def test_another_form_is_refused(use: Callable[[str], object], reference: str) -> None:
    assert sentence(lambda: use(reference)) == f"{reference}: must have the form path/to/file.py:function"


@pytest.mark.parametrize("use", [user_code.load_function, user_code.file_digest])
def test_a_missing_file_is_named(use: Callable[[str], object]) -> None:
    assert sentence(lambda: use(NAME)) == f"{NAME}: no such file {FILE}"


@pytest.mark.parametrize("use", [user_code.load_function, user_code.file_digest])
def test_a_folder_in_place_of_the_file_is_named(use: Callable[[str], object]) -> None:
    Path(FILE).mkdir()
    assert sentence(lambda: use(NAME)).startswith(f"{NAME}: no such file {FILE}")


@pytest.mark.parametrize("text", ["", "def attac():\n    pass\n", "attack = 3\n"])
def test_a_missing_function_is_named(text: str) -> None:
    Path(FILE).write_text(text)
    assert sentence(lambda: user_code.load_function(NAME)) == f"{NAME}: {FILE} has no function 'attack'"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("raise ValueError('first line\\nsecond line')\n", "ValueError: first line"),
        ("import no_such_module_anywhere\n", "ModuleNotFoundError: No module named 'no_such_module_anywhere'"),
        ("def attack(:\n", "SyntaxError: "),
        ("assert False\n", "AssertionError: no reason given"),
    ],
)
def test_an_import_that_raises_gives_its_reason(text: str, reason: str) -> None:
    Path(FILE).write_text(text)
    expected = f"{NAME}: importing {FILE} raised {reason}"
    assert sentence(lambda: user_code.load_function(NAME)).startswith(expected)


def test_a_call_that_raises_gives_its_reason_and_keeps_the_cause() -> None:
    Path(FILE).write_text("def attack():\n    raise RuntimeError('out of\\nideas')\n")
    function = user_code.load_function(NAME)
    assert sentence(lambda: user_code.call(NAME, function)) == f"{NAME} raised RuntimeError: out of"
    with pytest.raises(UserError) as caught:
        user_code.call(NAME, function)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_user_error_inside_is_passed_on_as_it_is() -> None:
    def complain() -> None:
        raise UserError("params.yaml: seed: is missing")

    assert sentence(lambda: user_code.call(NAME, complain)) == "params.yaml: seed: is missing"


def test_keyboard_interrupt_is_not_caught() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        user_code.call(NAME, stop)


def test_the_digest_is_that_of_the_file() -> None:
    Path(FILE).write_bytes(b"def attack(): pass\n")
    assert user_code.file_digest(NAME) == hashlib.sha256(b"def attack(): pass\n").hexdigest()


def test_a_changed_file_is_imported_again() -> None:
    for answer in (1, 2):
        Path(FILE).write_text(f"def attack():\n    return {answer}\n")
        assert user_code.load_function(NAME)() == answer


# ---- a user's own attack


def run_own(body: str, images: Tensor | None = None) -> Tensor:
    Path(FILE).write_text("import torch\n" + ATTACK + body + "\n")
    images = torch.full((2, 1, 3, 3), 0.5) if images is None else images
    draws, labels = ImageStreams(0, "own", torch.arange(2)), torch.tensor([0, 1])
    settings = Custom(kind="own", function=NAME)
    return custom(lambda pixels: pixels.flatten(1), images, labels, ball=LInf(0.1), settings=settings, draws=draws)


def test_a_custom_attack_receives_the_arguments_of_every_attack() -> None:
    body = "return images + ball.epsilon * draws.uniform(images) * (model(images).argmax(1) == 0)[:, None, None, None]"
    found = run_own(body)
    images = torch.full((2, 1, 3, 3), 0.5)
    noise = 0.1 * ImageStreams(0, "own", torch.arange(2)).uniform(images)
    torch.testing.assert_close(found, images + noise)


def test_a_custom_attack_may_return_another_dtype() -> None:
    assert run_own("return images.double()").dtype == torch.float32


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("return images[:1]", "must return images of shape (2, 1, 3, 3), not (1, 1, 3, 3)"),
        ("return images.flatten(1)", "must return images of shape (2, 1, 3, 3), not (2, 9)"),
        ("return None", "must return images of shape (2, 1, 3, 3), not NoneType"),
        ("return images, labels", "must return images of shape (2, 1, 3, 3), not tuple"),
        ("return images * torch.nan", "returned NaN or infinite pixels"),
        ("return images / 0", "returned NaN or infinite pixels"),
    ],
)
def test_a_custom_attack_that_returns_no_images_is_refused(body: str, complaint: str) -> None:
    assert sentence(lambda: run_own(body)) == f"{NAME}: {complaint}"


def test_a_custom_attack_that_raises_is_named() -> None:
    assert sentence(lambda: run_own("return images @ labels")).startswith(f"{NAME} raised RuntimeError: ")


def test_a_custom_attack_with_another_signature_is_named() -> None:
    Path(FILE).write_text("def attack(model, images):\n    return images\n")
    images, draws = torch.zeros(1, 1, 2, 2), ImageStreams(0, "own", torch.arange(1))

    def action() -> Tensor:
        settings, labels = Custom(kind="own", function=NAME), torch.zeros(1)
        return custom(lambda pixels: pixels, images, labels, ball=LInf(0.1), settings=settings, draws=draws)

    assert sentence(action).startswith(f"{NAME} raised TypeError: attack() ")
