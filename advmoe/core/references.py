"""Adversaries by name: entries of params.yaml refer to the section `adversaries` instead of repeating it."""

from collections.abc import Mapping
from typing import Any

from advmoe.core.errors import UserError

SECTION = "adversaries"
REMOVED = ("reads", "beside", "needs")  # keys of entries in earlier versions
USES = ("adversary", "of")  # keys whose values are adversaries; `of` lists those of a mixed one


def resolve_adversaries(params: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Returns params.yaml with each `adversary: NAME` replaced by the entry of that name under `adversaries`.

    Raises UserError, with `where` before the key, for a name that is not there. Adversaries that are written out are
    left as they are.
    """
    known = params.get(SECTION)
    if not isinstance(known, Mapping):
        return dict(params)
    prefix = f"{where}: " if where else ""
    return {
        key: value if key == SECTION else _resolved(value, known, f"{prefix}{key}") for key, value in params.items()
    }


def refuse_removed_keys(value: object) -> object:
    """Returns `value`, an entry of params.yaml. Raises ValueError where it has a key that is derived now."""
    written = [key for key in REMOVED if isinstance(value, Mapping) and key in value]
    if written:
        keys = ", ".join(f"'{key}'" for key in written)
        raise ValueError(f"delete {keys}: what a stage depends on is derived from params.yaml now")
    return value


def in_current_form(params: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Returns params.yaml of this or an earlier version with adversaries written out and without removed keys, so that
    experiments of different versions can be compared. Raises UserError for an adversary that is not there.
    """
    resolved = resolve_adversaries(params, where)
    resolved.pop(SECTION, None)
    for section in ("experts", "baseline"):
        entries = resolved.get(section)
        if isinstance(entries, Mapping):
            resolved[section] = {name: entry_in_current_form(entry) for name, entry in entries.items()}
    return resolved


def entry_in_current_form(entry: Any) -> Any:
    """Returns an entry of `experts` or `baseline` of this or an earlier version without removed keys."""
    if not isinstance(entry, Mapping):
        return entry
    current = {key: value for key, value in entry.items() if key not in REMOVED}
    if current.get("match") == "passes":
        current = {key: value for key, value in current.items() if key != "match"} | {"kind": "equal-passes"}
    return current


def _resolved(value: Any, known: Mapping[str, Any], where: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {
        key: _adversary(each, known, f"{where}.{key}") if key in USES else _resolved(each, known, f"{where}.{key}")
        for key, each in value.items()
    }


def _adversary(value: Any, known: Mapping[str, Any], where: str) -> Any:
    if isinstance(value, list):
        return [_adversary(each, known, where) for each in value]
    if not isinstance(value, str):
        return _resolved(value, known, where)
    if value not in known:
        raise UserError(f"{where}: there is no '{value}' under {SECTION}; known are {', '.join(map(str, known))}")
    # without this name: an adversary that refers to itself would recurse forever
    return _resolved(known[value], {name: each for name, each in known.items() if name != value}, where)
