"""Conversations with environments: turns of the policy, calls of tools and their results, as one completion.

Sampled token ids are appended as they are; what tools and users say is encoded once and appended, masked. See
`groupwise.models.conversation`.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from groupwise.config import EnvironmentSection
from groupwise.environments.find import Environments
from groupwise.environments.hosting import Host, Lent
from groupwise.environments.instance import EnvironmentFailed, Instance, ToolResult, error_text
from groupwise.environments.kinds import Kind
from groupwise.errors import UserError
from groupwise.kept import KeptTokens
from groupwise.models import Chat
from groupwise.models.conversation import Conversations, Said
from groupwise.models.turn_ends import DEFAULT_ID
from groupwise.rollouts.base import Request, Sampler, Sampling
from groupwise.rollouts.driver import gather
from groupwise.seeding import derive
from groupwise.tasks.base import TakesEnvironments, Task
from groupwise.types import Completion, Group, Message, Problem, Score, Stop, Turn, VersionSpan


@dataclass(slots=True, kw_only=True)
class Episode:
    """One conversation under way."""

    instance: Instance
    prompt: Tensor
    """int64 [L], of this conversation alone."""
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """int64 [T], what came after the prompt."""
    logprobs: Tensor = field(default_factory=lambda: torch.zeros(0))
    mask: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    turns: list[Turn] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)
    kept: list[tuple[KeptTokens | None, int]] = field(default_factory=list)
    """Of each turn: what the sampler's limits left to choose from, and how many tokens it has."""
    attempts: int = 1
    """The most that any turn of the policy took."""
    stop: Stop = "stop"
    failure: EnvironmentFailed | None = None
    """Why it is set aside."""

    def add_sampled(self, said: Completion) -> None:
        """Append a turn of the policy."""
        start = len(self.tokens)
        self.tokens = torch.cat([self.tokens, said.tokens])
        self.logprobs = torch.cat([self.logprobs, said.logprobs])
        self.mask = torch.cat([self.mask, said.mask])
        self.versions += [VersionSpan(start + span.start, start + span.end, span.version) for span in said.versions]
        self.turns.append(Turn(role="assistant", start=start, end=len(self.tokens)))
        self.kept.append((said.kept, len(said.tokens)))
        self.attempts = max(self.attempts, said.attempts)

    def add_masked(self, tokens: Tensor, turn: Turn) -> None:
        """Append what somebody else said; `turn` knows who, and its place is set here."""
        start = len(self.tokens)
        self.tokens = torch.cat([self.tokens, tokens])
        self.logprobs = torch.cat([self.logprobs, torch.zeros(len(tokens))])
        self.mask = torch.cat([self.mask, torch.zeros(len(tokens), dtype=torch.bool)])
        self.turns.append(replace(turn, start=start, end=len(self.tokens)))
        self.kept.append((None, len(tokens)))

    def completion(self, prefix: int, tokenizer: Any) -> Completion:
        """All that came after the first `prefix` tokens of the prompt."""
        lead = self.prompt[prefix:]
        shift = len(lead)
        turns = [replace(turn, start=turn.start + shift, end=turn.end + shift) for turn in self.turns]
        if shift:
            turns.insert(0, Turn(role="user", start=0, end=shift))
        tokens = torch.cat([lead, self.tokens])
        kept, lengths = zip((None, shift), *self.kept, strict=True)
        return Completion(
            text=tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tokens,
            logprobs=torch.cat([torch.zeros(shift), self.logprobs]),
            mask=torch.cat([torch.zeros(shift, dtype=torch.bool), self.mask]),
            stop=self.stop,
            versions=tuple(VersionSpan(span.start + shift, span.end + shift, span.version) for span in self.versions),
            turns=tuple(turns),
            messages=tuple(self.messages),
            kept=KeptTokens.join(kept, lengths),
            attempts=self.attempts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What fixes every random number of a group's completions."""

    seed: int
    """Of the batch of groups."""
    before: int
    """Completions of the groups before it."""


class Episodes:
    """Holds the conversations of groups."""

    def __init__(self, environments: Environments, settings: EnvironmentSection, chat: Chat) -> None:
        """
        Raises:
            UserError: the chat template cannot be used for conversations with these tools.
        """
        self.environments, self.settings, self.chat = environments, settings, chat
        self.host = Host(settings.time_limit)
        self.conversations: Mapping[str | None, Conversations] = {
            name: Conversations(chat, kind.schemas) for name, kind in environments.kinds.items()
        }

    def kind(self, problem: Problem) -> Kind:
        """The problem's kind of environment."""
        return self.environments.kinds[self.environments.name_of(problem)]

    def asks_task(self, problem: Problem) -> bool:
        """Whether the task's rewards count."""
        return bool(self.settings.task_reward) or not self.is_rewarded(problem)

    def is_rewarded(self, problem: Problem) -> bool:
        """Whether the environment says what a conversation about the problem earns."""
        return self.kind(problem).has_reward

    def conversation(self, problem: Problem) -> Conversations:
        """How conversations about the problem become tokens."""
        return self.conversations[self.environments.name_of(problem)]

    def prompt(self, problem: Problem, said: str | None = None) -> Tensor:
        """int64 [L]: the problem's prompt, tools included; `said` by reset() is appended to its last message."""
        messages = self.chat.messages(problem.prompt)
        if said:
            content = messages[-1]["content"]
            addition = said if isinstance(content, str) else [{"type": "text", "text": said}]
            messages[-1] = {**messages[-1], "content": content + addition}
        return self.conversation(problem).prompt(messages)

    async def group(
        self, sampler: Sampler, sampling: Sampling, task: Task, problem: Problem, n: int, draw: Draw
    ) -> tuple[Group, float]:
        """n conversations about a problem, scored, and when the last of them was complete."""
        async with self.host.instances(self.kind(problem), n) as instances:
            episodes = await gather(*(self._begin(problem, instance) for instance in instances))
            prompts = [episode.prompt for episode in episodes]
            prefix = common_prefix(prompts)
            await self._speak(sampler, sampling, problem, episodes, draw)
            completions = tuple(episode.completion(prefix, self.chat.tokenizer) for episode in episodes)
            generated = time.perf_counter()
            of_task = await self._ask_task(task, problem, episodes, completions)
            pairs = zip(episodes, of_task, strict=True)
            scores = with_turns(episodes, await gather(*(self._score(self.kind(problem), *pair) for pair in pairs)))
        group = Group(problem=problem, prompt_tokens=prompts[0][:prefix], completions=completions, scores=tuple(scores))
        return group, generated

    def check(self) -> tuple[str, ...]:
        """Try the chat template with each kind's tools; returns remarks for a person to read.

        Raises:
            UserError: tokens differ from what they must be.
        """
        return tuple(dict.fromkeys(remark for found in self.conversations.values() for remark in found.check()))

    async def trial(self, problem: Problem) -> None:
        """Begin a conversation, and end it before anything is said.

        Raises:
            EnvironmentFailed: the environment does.
        """
        async with self.host.instances(self.kind(problem), 1) as (instance,):
            await instance.reset(self.environments.row(problem))
            if self.kind(problem).has_reward:
                await instance.get_reward()

    async def trial_scores(self, task: Task, problem: Problem, completions: Sequence[Completion]) -> Sequence[Score]:
        """What the task says of completions that are made up, in conversations in which nothing was said.

        Raises:
            EnvironmentFailed: the environment does.
        """
        async with self.host.instances(self.kind(problem), len(completions)) as instances:
            await gather(*(instance.reset(self.environments.row(problem)) for instance in instances))
            return await score_episodes(task, problem, completions, instances)

    async def _ask_task(
        self, task: Task, problem: Problem, episodes: Sequence[Episode], completions: Sequence[Completion]
    ) -> list[Score | None]:
        """The task's score of each conversation that is not set aside; None of the others, and where the task is not asked."""
        scores: list[Score | None] = [None] * len(episodes)
        asked = [i for i, episode in enumerate(episodes) if episode.failure is None] if self.asks_task(problem) else []
        if asked:
            instances = [episodes[i].instance for i in asked]
            found = await score_episodes(task, problem, [completions[i] for i in asked], instances)
            for i, score in zip(asked, found, strict=True):
                scores[i] = score
        return scores

    async def _begin(self, problem: Problem, instance: Instance) -> Episode:
        said, failure = None, None
        try:
            said = await instance.reset(self.environments.row(problem))
        except EnvironmentFailed as error:
            failure = error
        return Episode(instance=instance, prompt=self.prompt(problem, said), failure=failure)

    async def _speak(
        self, sampler: Sampler, sampling: Sampling, problem: Problem, episodes: Sequence[Episode], draw: Draw
    ) -> None:
        """Hold the conversations. Where they begin with the same prompt, their first turns are one request."""
        ends = self.conversation(problem).stop_tokens
        sampling = replace(sampling, stop_tokens=tuple(sorted({*sampling.stop_tokens, *ends})))
        seeds = [(draw.seed, draw.before + i) for i in range(len(episodes))]
        prompt = episodes[0].prompt
        if all(torch.equal(prompt, episode.prompt) for episode in episodes):
            offset = draw.before * sampling.max_tokens
            request = Request(prompt=prompt, sampling=sampling, seed=draw.seed, offset=offset, n=len(episodes), keep=True)
            said = list(await sampler.generate(request))
        else:
            requests = [
                Request(prompt=episode.prompt, sampling=sampling, seed=derive(*seed, 0), keep=True)
                for episode, seed in zip(episodes, seeds, strict=True)
            ]
            said = [found[0] for found in await gather(*(sampler.generate(request) for request in requests))]
        triples = zip(episodes, said, seeds, strict=True)
        await gather(*(self._converse(sampler, sampling, problem, episode, turn, seed) for episode, turn, seed in triples))

    async def _converse(
        self, sampler: Sampler, sampling: Sampling, problem: Problem, episode: Episode, said: Completion, seed: tuple[int, ...]
    ) -> None:
        """Go on from the first sampled turn until nobody answers, or a limit is reached."""
        conversation = self.conversation(problem)
        for number in range(1, self.settings.max_turns + 1):
            before = torch.cat([episode.prompt, episode.tokens])
            episode.add_sampled(said)
            turn = conversation.parse(said.tokens, before)
            episode.messages.append(turn.message)
            episode.turns[-1] = replace(episode.turns[-1], calls=len(turn.calls), errors=int(turn.problem is not None))
            if said.stop == "length":
                episode.stop = "length"
                return
            if number == self.settings.max_turns or episode.failure is not None:
                return
            try:
                messages, answer, done = await self._answer(episode, turn, self.kind(problem))
                suffix = self._suffix(conversation, said.tokens, messages) if messages and not done else None
            except EnvironmentFailed as error:
                episode.failure = error
                return
            if suffix is not None and len(episode.tokens) + len(suffix) >= sampling.max_tokens:
                episode.stop = "length"
                return
            episode.messages += messages
            if suffix is None:
                return
            episode.add_masked(suffix, answer)
            request = Request(
                prompt=torch.cat([episode.prompt, episode.tokens]),
                sampling=replace(sampling, max_tokens=sampling.max_tokens - len(episode.tokens)),
                seed=derive(*seed, number),
                keep=True,
                continues=said.handle,
            )
            said = (await sampler.generate(request))[0]

    def _suffix(self, conversation: Conversations, tokens: Tensor, messages: Sequence[Message]) -> Tensor:
        """int64 [L]: the tokens of what is said to a turn.

        Raises:
            EnvironmentFailed: the chat template refuses the messages, as Gemma's does two of the user in succession.
        """
        try:
            return conversation.after(tokens, messages)
        except UserError as error:
            raise EnvironmentFailed("wrong type", str(error)) from error

    async def _answer(self, episode: Episode, turn: Said, kind: Kind) -> tuple[Sequence[Message], Turn, bool]:
        """What is said to a turn of the policy, by whom (a turn without place), and whether the conversation is over.

        Tools answer a turn that calls them, the simulated user any other. Sets the reward of the policy's turn.

        Raises:
            EnvironmentFailed: the environment cannot go on.
        """
        instance = episode.instance
        messages: list[Message] = []
        answer, reward, done = Turn(role="tool", start=0, end=0), None, False
        for call in turn.calls:
            if call.name in kind.tool_names:
                result = await instance.call(call.name, call.arguments)
            else:
                result = ToolResult(error_text(f"Tool {call.name} not found."), error=True)  # in TRL's words
            messages.append({"role": "tool", "name": call.name, "tool_call_id": call.id, "content": result.content})
            answer = replace(answer, errors=answer.errors + result.error)
        if not turn.calls and turn.problem is not None and kind.schemas:
            message = {"role": "tool", "name": kind.tool_names[0], "tool_call_id": DEFAULT_ID}
            messages.append({**message, "content": error_text(turn.problem)})
            answer = replace(answer, errors=1)
        elif not turn.calls and kind.has_step:
            said = await instance.step(turn.message)
            messages, reward, done = list(said.messages), said.reward, said.done
            answer = replace(answer, role="user")
        gained = await instance.turn_reward()
        if reward is not None or gained is not None:
            episode.turns[-1] = replace(episode.turns[-1], reward=(reward or 0.0) + (gained or 0.0))
        return messages, answer, done

    async def _score(self, kind: Kind, episode: Episode, of_task: Score | None) -> Score:
        """What get_reward() says, or the task, or both."""
        score = of_task
        try:
            if episode.failure is not None:
                raise episode.failure
            if kind.has_reward:
                score = self._with_reward(await episode.instance.get_reward(), of_task)
        except EnvironmentFailed as error:
            return Score.failed(error.cause, error.detail)
        assert score is not None
        return score

    def _with_reward(self, reward: float, of_task: Score | None) -> Score:
        """The environment's reward as a score, added to that of the task where there is one."""
        above = self.environments.correct_above
        correct = None if above is None else reward > above
        if of_task is None:
            return Score(reward=reward, correct=correct)
        if of_task.failure is not None:
            return of_task
        both = with_part(of_task, "task", "environment", reward)
        return both if correct is None else replace(both, correct=correct)


async def score_episodes(
    task: Task, problem: Problem, completions: Sequence[Completion], instances: Sequence[Instance]
) -> Sequence[Score]:
    """The task's scores; rewards that take environments are given the instances."""
    if isinstance(task, TakesEnvironments):
        return await task.score_episodes(problem, completions, Lent.of(instances))
    return await task.score(problem, completions)


def with_turns(episodes: Sequence[Episode], scores: Sequence[Score]) -> Sequence[Score]:
    """The scores of a group with the rewards of turns. Where any turn earned something, conversations in which none did get 0, so
    that all rewards of the group have parts of the same names."""
    earned = [[turn.reward for turn in episode.turns if turn.reward is not None] for episode in episodes]
    if not any(earned):
        return scores
    return [
        score if score.failure is not None else with_part(score, "outcome", "turns", sum(rewards))
        for score, rewards in zip(scores, earned, strict=True)
    ]


def with_part(score: Score, name: str, added: str, reward: float) -> Score:
    """A score with a further part of its reward; `name` is that of what it had, where its parts have no names."""
    parts = {**(score.components or {name: score.reward}), added: reward}
    return replace(score, reward=score.reward + reward, verdict=None, components=parts)


def make_episodes(environments: Environments | None, settings: EnvironmentSection, chat: Chat) -> Episodes | None:
    """What holds a recipe's conversations; None where turns are not answered."""
    return None if environments is None else Episodes(environments, settings, chat)


def common_prefix(prompts: Sequence[Tensor]) -> int:
    """How many tokens all of them begin with."""
    shortest = min(len(prompt) for prompt in prompts)
    tokens_PL = torch.stack([prompt[:shortest] for prompt in prompts])
    return int((tokens_PL == tokens_PL[0]).all(0).cumprod(0).sum())
