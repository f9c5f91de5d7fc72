"""Profiles: small YAML overlays that `advmoe use NAME` lays over params.yaml, comments kept."""

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from advmoe import files, paths
from advmoe.errors import UserError
from advmoe.params import PARAMS_FILE, read_yaml, validate
from advmoe.schema import Params

NULL_TAG = "tag:yaml.org,2002:null"
LINE_WIDTH = 4096  # never fold a line: a comment belongs to its key


def known() -> list[str]:
    """Names of the profiles in the project."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def use(name: str) -> list[str]:
    """Lay a profile over params.yaml; returns the keys that changed, with dots.

    The result is validated before anything is written. Raises UserError for an unknown or invalid profile.
    """
    path = paths.PROFILES / f"{name}.yaml"
    if name not in known():
        raise UserError(f"{path}: no such profile; known are {files.names(known())}")
    read_yaml(path), read_yaml(PARAMS_FILE)  # for the clear sentence when one of them is broken
    yaml = _round_trip()
    params, overlay = (_load(yaml, file) for file in (PARAMS_FILE, path))
    changed = _lay(params, overlay, "")
    text = io.StringIO()
    yaml.dump(params, text)
    validate(YAML(typ="safe").load(text.getvalue()), Params, str(path))
    files.write_text(PARAMS_FILE, text.getvalue())
    return changed


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = LINE_WIDTH
    yaml.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(NULL_TAG, "null"))
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(yaml: YAML, path: Path) -> CommentedMap:
    try:
        content = yaml.load(path.read_text())
    except YAMLError as error:  # a duplicate key, say, that the safe reader forgave
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    assert isinstance(content, CommentedMap)
    return content


def _lay(base: CommentedMap, overlay: CommentedMap, prefix: str) -> list[str]:
    """Overlay `base` in place. A mapping of another `kind` is another thing and is replaced as a whole."""
    changed: list[str] = []
    for key, value in overlay.items():
        old = base.get(key)
        if isinstance(value, CommentedMap) and isinstance(old, CommentedMap) and _same_thing(value, old):
            changed += _lay(old, value, f"{prefix}{key}.")
        elif old != value or key not in base:
            base[key] = value
            changed.append(f"{prefix}{key}")
        _take_comment(base, overlay, key)
    return changed


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
