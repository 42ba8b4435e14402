"""What a rule finds in a run, and what rules need to say it."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from groupwise.algorithms import NAMED, named
from groupwise.evidence.phrases import Phrase, phrase, same
from groupwise.evidence.runs import PASS_RATE, Measure, Run

Kind = Literal["unhealthy", "watch", "healthy"]
NOTHING = same("")
EARLY = 5
"""Steps before which what may pass makes no run unhealthy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one rule found in a run."""

    kind: Kind
    title: Phrase
    text: Phrase
    """One to three sentences: the numbers, what they mean, what to change."""
    figure: str
    """The id of the figure that shows it, or "events"."""


def say(key: str, **values: Any) -> Phrase:
    """A text of `templates/findings_text.toml`."""
    return phrase("findings", key, **values)


def sentences(parts: Iterable[Phrase]) -> Phrase:
    """One after the other; Chinese has no space between sentences."""
    parts = list(parts)
    return Phrase(" ".join(part.en for part in parts if part.en), "".join(part.zh for part in parts))


def three_digits(value: float) -> str:
    """A number in a sentence of any language."""
    return f"{value:.3g}".replace("-", "−")


def measure_name(measure: Measure, *, within: bool = False) -> Phrase:
    """What held-out results are measured by.

    Args:
        within: it stands between Chinese characters, from which Latin letters are set apart.
    """
    return say(f"words.{'pass_rate' if measure is PASS_RATE else 'mean_reward'}{'_within' if within else ''}")


def setting(run: Run, key: str) -> Any:
    """A setting of the run's algorithm: from its recipe, else the named algorithm's own value; None where it is not in use."""
    name = run.algorithm
    usual = _usual(name if name in NAMED else "custom").get(key)
    own = run.recipe.get("algorithm", {}).get(key, usual)
    damaged = isinstance(usual, int | float) and not isinstance(own, int | float)
    return usual if damaged else own


@cache
def _usual(algorithm: str) -> dict[str, Any]:
    return named(algorithm).settings()


def under_way(run: Run) -> bool:
    """Whether steps are left to do."""
    return run.last_step < int(run.recipe.get("training", {}).get("steps", 0))


def warned_of(run: Run, name: str) -> bool:
    """Whether the run noted a warning or a fault of this name."""
    return any(event.name == name and event.kind != "note" for event in run.events)
