"""`python -m benchmarks.kills` with two kills per stage."""

import random

import pytest

from benchmarks.kills import STAGES, kill_repeatedly

KILLS = 2


@pytest.mark.pipeline
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_random_times_writes_the_same_files(stage: str) -> None:
    assert kill_repeatedly(stage, KILLS, random.Random(stage)) == []  # noqa: S311  (not for cryptography)
