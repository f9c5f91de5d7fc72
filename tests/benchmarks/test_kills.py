"""The short form of `python -m benchmarks.kills`: real processes, SIGKILL, and what is left in the end."""

import random

import pytest

from benchmarks.kills import STAGES, kill

KILLS = 2


@pytest.mark.pipeline
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_random_moments_leaves_what_an_undisturbed_one_leaves(stage: str) -> None:
    assert kill(stage, KILLS, random.Random(stage)) == []  # noqa: S311  (moments, no secrets)
