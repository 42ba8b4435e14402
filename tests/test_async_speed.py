"""benchmarks/async_speed.py in small: a real run over synthetic samplers, and what the simulation says of it."""

from types import SimpleNamespace

import async_speed


def test_a_run_over_simulated_devices_is_no_faster_than_simulated_and_faster_when_asynchronous() -> None:
    arguments = SimpleNamespace(launcher="local", steps=3, fixed=0.004, learn=0.5)
    seconds = []
    for name in ("synchronous", "staleness 4"):
        expected, found = (
            async_speed.predict(async_speed.MODES[name], arguments),
            async_speed.run(async_speed.MODES[name], arguments),
        )
        assert found["ledger problems"] == 0
        assert found["age"] <= async_speed.MODES[name]["staleness"] + 1
        assert found["seconds"] >= 0.95 * expected
        seconds.append(found["seconds"])
    assert seconds[1] < seconds[0]
