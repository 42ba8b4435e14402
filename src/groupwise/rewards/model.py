"""A reward model as a reward."""

from collections.abc import Sequence
from dataclasses import dataclass

from groupwise.environments.hosting import Lent
from groupwise.errors import UserError
from groupwise.models.reward_model import RewardModel
from groupwise.rewards.base import Progress, Rated, all_failed
from groupwise.rewards.user import prompt_of, said
from groupwise.rewards.values import rate_value
from groupwise.types import Completion, Problem


@dataclass(frozen=True, slots=True)
class ModelReward:
    """The scalar that a sequence classifier gives to prompt and completion.

    It runs between two decoding steps, in the thread that generates: a second one would contend for the same cores.
    """

    name: str
    model: RewardModel

    async def rate(
        self, problem: Problem, completions: Sequence[Completion], progress: Progress, environments: Lent | None = None
    ) -> Sequence[Rated]:
        try:
            values = self.model.rewards(prompt_of(problem), [said(problem, completion) for completion in completions])
        except UserError as error:  # its chat template refuses the messages
            return all_failed(len(completions), "raised", str(error))
        return [rate_value(value, len(completion.text)) for value, completion in zip(values, completions, strict=True)]
