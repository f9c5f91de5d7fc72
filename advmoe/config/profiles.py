"""Profiles: small YAML overlays that `advmoe use NAME` lays over params.yaml; comments are kept."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from advmoe.config.schema import Params
from advmoe.core import files, paths
from advmoe.core.errors import MALFORMED_INPUT_ERRORS, UserError
from advmoe.core.settings import PARAMS_FILE, read_yaml, validate

NULL_TAG = "tag:yaml.org,2002:null"
BASE = "digits"  # the default, which every other profile changes
EXTENDS = "extends"  # first key of a profile: the profiles that it changes
# mappings by name that a profile replaces as a whole, so that no entry of another profile stays; a profile that extends
# others changes single entries
WHOLE = frozenset({"baseline", "poison.attacks", "extract.attacks", "membership.victims", "report.claims"})
LINE_WIDTH = 4096  # never fold a line: a comment belongs to its key


@dataclass(frozen=True)
class Change:
    """A key of params.yaml, with dots, and its values before and after; None where there is none."""

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {_short(self.before)} -> {_short(self.after)}"


def known() -> list[str]:
    """Returns the names of the profiles in the project."""
    return sorted(path.stem for path in paths.PROFILES.glob("*.yaml"))


def use(*names: str, write: bool = True) -> list[Change]:
    """Lays the default profile and then `names` over params.yaml and returns what differs afterwards.

    The default comes first, because another profile may have changed any key; each profile comes after those that it
    extends. The result is validated before anything is written; with `write=False` nothing is. Raises UserError for an
    unknown or invalid profile.
    """
    chosen = _in_order(names)
    before = read_yaml(PARAMS_FILE)
    yaml = _round_trip()
    params = _load(yaml, PARAMS_FILE)
    for name in chosen:
        overlay = _load(yaml, _path(name))
        extends = overlay.pop(EXTENDS, None)
        _merge(params, overlay, frozenset() if extends else WHOLE)
    text = io.StringIO()
    yaml.dump(params, text)
    after = YAML(typ="safe").load(text.getvalue())
    try:
        _validate(after, " + ".join(str(_path(name)) for name in names))
    except UserError:
        _validate(before, str(PARAMS_FILE))  # reports params.yaml instead if it was invalid before
        raise
    if write:
        files.write_text(PARAMS_FILE, text.getvalue())
    return list(_changes(before, after))


def _validate(params: dict[str, Any], where: str) -> None:
    validate(params, Params, where)


def _path(name: str) -> Path:
    return paths.PROFILES / f"{name}.yaml"


def _in_order(names: Sequence[str]) -> list[str]:
    """The default, then `names`, each after the profiles that it extends. Raises UserError for unknown names."""
    order: list[str] = []

    def add(name: str, chain: tuple[str, ...]) -> None:
        if name in chain:
            raise UserError(f"{_path(name)}: extends itself ({' -> '.join((*chain, name))})")
        if name not in known():
            raise UserError(f"{_path(name)}: no such profile; known are {files.join_names(known())}")
        extends = read_yaml(_path(name)).get(EXTENDS, [])
        if not isinstance(extends, list) or not all(isinstance(each, str) for each in extends):
            raise UserError(f"{_path(name)}: '{EXTENDS}' must be a list of profiles, for example [cifar10]")
        for each in extends:
            add(each, (*chain, name))
        if chain == () or name not in order:
            order.append(name)

    for name in (BASE, *names):
        add(name, ())
    return order


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _changes(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    for key in {**before, **after}:
        old, new, path = before.get(key), after.get(key), f"{prefix}{key}"
        if isinstance(new, dict) and isinstance(old, dict) and new.get("kind") == old.get("kind"):
            yield from _changes(old, new, f"{path}.")
        elif (key in before) != (key in after) or old != new:
            yield Change(path, old, new)


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.width = LINE_WIDTH
    yaml.representer.add_representer(type(None), lambda dumper, _: dumper.represent_scalar(NULL_TAG, "null"))
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def _load(yaml: YAML, path: Path) -> CommentedMap:
    try:
        content = yaml.load(path.read_text())
    except (
        YAMLError,
        *MALFORMED_INPUT_ERRORS,
    ) as error:  # not reported by the safe reader, such as a duplicate key or a misplaced tag
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, CommentedMap):
        raise UserError(f"{path}: must be a plain mapping of sections")
    return content


def _merge(base: CommentedMap, overlay: CommentedMap, whole: frozenset[str], prefix: str = "") -> None:
    """Merges `overlay` into `base` in place. A mapping of another `kind` is replaced as a whole."""
    for key, value in overlay.items():
        old, path = base.get(key), f"{prefix}{key}"
        merge = isinstance(value, CommentedMap) and isinstance(old, CommentedMap) and path not in whole
        if merge and _same_kind(value, old):
            _merge(old, value, whole, f"{path}.")
        elif old != value or key not in base:
            base[key] = value
        _take_comment(base, overlay, key)


def _same_kind(overlay: CommentedMap, base: CommentedMap) -> bool:
    return bool(overlay.get("kind", base.get("kind")) == base.get("kind"))


def _take_comment(base: CommentedMap, overlay: CommentedMap, key: Any) -> None:
    """Replaces the comment of a key by the profile's, because a comment gives the reason for the value."""
    here, there = base.ca.items.get(key), overlay.ca.items.get(key)
    if not there or not there[2] or (isinstance(base[key], CommentedMap) and not base[key].fa.flow_style()):
        return
    comment = there[2]
    # what follows the end of the line (blank lines, headings) belongs to the file, not to the key
    following = here[2].value.partition("\n")[2] if here and here[2] else ""
    comment.value = f"{comment.value.partition(chr(10))[0]}\n{following}"
    base.ca.items[key] = there
