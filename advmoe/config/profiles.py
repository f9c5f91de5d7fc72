"""Profiles: small YAML overlays that `advmoe use NAME` lays over params.yaml, comments kept."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from advmoe.config.schema import Params
from advmoe.core import files, paths
from advmoe.core.errors import STUMBLES, UserError
from advmoe.core.settings import PARAMS_FILE, read_yaml, validate

NULL_TAG = "tag:yaml.org,2002:null"
BASE = "digits"  # what every profile is an overlay of
# lists by name that a profile gives as a whole, or those of another would stay behind
WHOLE = {"baseline", "poison.attacks", "extract.attacks", "membership.victims", "report.claims"}
LINE_WIDTH = 4096  # never fold a line: a comment belongs to its key


def known() -> list[str]:
    """Names of the profiles in the project."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def use(*names: str) -> list[str]:
    """Lay the default profile and then these over params.yaml; returns the keys that differ afterwards, with dots.

    The default comes first, or what another profile changed would stay behind. The result is validated before anything
    is written. Raises UserError for an unknown or invalid profile.
    """
    layers = [paths.PROFILES / f"{name}.yaml" for name in (BASE, *names)]
    for name, path in zip(names, layers[1:], strict=True):
        if name not in known():
            raise UserError(f"{path}: no such profile; known are {files.names(known())}")
    before = read_yaml(PARAMS_FILE)
    yaml = _round_trip()
    params = _load(yaml, PARAMS_FILE)
    for layer in layers:
        read_yaml(layer)  # for the clear sentence when it is no mapping
        _lay(params, _load(yaml, layer))
    text = io.StringIO()
    yaml.dump(params, text)
    after = YAML(typ="safe").load(text.getvalue())
    try:
        validate(after, Params, " + ".join(map(str, layers[1:])))
    except UserError:
        validate(before, Params, str(PARAMS_FILE))  # a mistake that was there before is not the profile's
        raise
    files.write_text(PARAMS_FILE, text.getvalue())
    return list(_differences(before, after))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict) and value.get("kind") == old.get("kind"):
            yield from _differences(old, value, f"{prefix}{key}.")
        elif key not in before or old != value:
            yield f"{prefix}{key}"


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = LINE_WIDTH
    yaml.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(NULL_TAG, "null"))
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(yaml: YAML, path: Path) -> CommentedMap:
    try:
        content = yaml.load(path.read_text())
    except (YAMLError, *STUMBLES) as error:  # what the safe reader forgave: a duplicate key, a tag out of place
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, CommentedMap):
        raise UserError(f"{path}: must be a plain mapping of sections")
    return content


def _lay(base: CommentedMap, overlay: CommentedMap, prefix: str = "") -> None:
    """Overlay `base` in place. A mapping of another `kind` is another thing and is replaced as a whole."""
    for key, value in overlay.items():
        old, path = base.get(key), f"{prefix}{key}"
        merge = isinstance(value, CommentedMap) and isinstance(old, CommentedMap) and path not in WHOLE
        if merge and _same_thing(value, old):
            _lay(old, value, f"{path}.")
        elif old != value or key not in base:
            base[key] = value
        _take_comment(base, overlay, key)


def _same_thing(overlay: CommentedMap, base: CommentedMap) -> bool:
    return bool(overlay.get("kind", base.get("kind")) == base.get("kind"))


def _take_comment(base: CommentedMap, overlay: CommentedMap, key: Any) -> None:
    """The reason beside a number must be the reason for that number: the profile's comment goes with its value."""
    here, there = base.ca.items.get(key), overlay.ca.items.get(key)
    if not there or not there[2] or (isinstance(base[key], CommentedMap) and not base[key].fa.flow_style()):
        return
    comment = there[2]
    # what follows the end of the line (blank lines, headings) belongs to the file, not to the key
    following = here[2].value.partition("\n")[2] if here and here[2] else ""
    comment.value = f"{comment.value.partition(chr(10))[0]}\n{following}"
    base.ca.items[key] = there
