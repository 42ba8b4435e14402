"""A seeded share of the campaign of benchmarks/fuzz.py: damaged and absurd input through the real commands."""

import fuzz
import pytest

SHARE = {"recipes": 200, "ladders": 200, "sft": 40, "data": 100, "runs": 20}
"""Cases of each kind; reports of runs take a second each."""


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_no_input_gives_a_traceback_or_takes_long(kind: str) -> None:
    found = fuzz.campaign(kind, first=0, count=SHARE[kind])
    assert len(found) == SHARE[kind]
    assert [(outcome.number, outcome.fault) for outcome in found if outcome.fault] == []
    assert sum(outcome.code == 2 for outcome in found) > len(found) / 4  # most are refused, and some are not
