"""What a recipe's prompts are: its task, how they become tokens, and the tools in them. No model is loaded."""

from typing import Any

from torch import Tensor

from groupwise.config import EnvironmentSection, Recipe, Source
from groupwise.environments.find import find_environments
from groupwise.errors import UserError
from groupwise.models import Chat, load_tokenizer
from groupwise.rollouts.episodes import Episodes
from groupwise.tasks.base import Task, build_task, limit_prompts
from groupwise.types import Problem


def build_prompts(recipe: Recipe, source: Source) -> tuple[Task, Chat, Episodes | None]:
    """The task, without the problems whose prompts are too long; how its prompts become tokens; and what holds its conversations,
    None if there is no environment.

    Raises:
        UserError: naming the file, line and key at fault.
    """
    task = build_task(recipe.task, source, environment=recipe.environment.kind is not None)
    try:
        tokenizer = load_tokenizer(recipe.model.path, trust_remote_code=recipe.model.trust_remote_code)
    except UserError as error:
        raise source.error("model.path", str(error)) from error
    chat = build_chat(recipe, tokenizer, source)
    episodes = build_episodes(recipe, chat, task, source)
    limit_prompts(task, chat, source, lambda problem: prompt_of(problem, chat, episodes))
    return task, chat, episodes


def prompt_of(problem: Problem, chat: Chat, episodes: Episodes | None) -> Tensor:
    """int64 [L]: a problem's prompt as the model reads it, tools included, but for what an environment's reset() appends."""
    return chat.encode(problem.prompt) if episodes is None else episodes.prompt(problem)


def build_chat(recipe: Recipe, tokenizer: Any, source: Source) -> Chat:
    """How the recipe's prompts become tokens.

    Raises:
        UserError: a chat template is asked for, or needed, and there is none.
    """
    model = recipe.model
    try:
        return Chat.build(tokenizer, model.chat, model.system_prompt, model.chat_template_kwargs)
    except UserError as error:
        raise source.error("model.chat", f"{error}: {model.path!r}") from error


def names_reward(task: dict[str, Any]) -> bool:
    """Whether a recipe's [task], or one of its sources, says how completions are rewarded."""
    tables = [task, *(table for table in task.get("sources", []) if isinstance(table, dict))]
    return any(bool(table.get("reward")) for table in tables)


def build_episodes(recipe: Recipe, chat: Chat, task: Task, source: Source) -> Episodes | None:
    """What holds the recipe's conversations, its chat template tried; None if neither recipe nor task has an environment.

    Raises:
        UserError: an environment or a tool cannot be found or used, or the chat template not with these tools; or there is no
            environment, and [environment] has keys for one.
    """
    environments = find_environments(recipe.environment, task, source)
    if environments is None:
        check_unused(recipe.environment, source)
        return None
    try:
        settings = recipe.environment
        if settings.task_reward is None:
            settings = settings.model_copy(update={"task_reward": names_reward(recipe.task)})
        episodes = Episodes(environments, settings, chat)
        episodes.check()
    except UserError as error:
        raise source.error("environment", f"{error}: {recipe.model.path!r}") from error
    return episodes


def check_unused(settings: EnvironmentSection, source: Source) -> None:
    """Refuse keys of [environment] that change nothing, since there is no environment. A run's own recipe holds every default.

    Raises:
        UserError: naming the first of them.
    """
    for name, field in type(settings).model_fields.items():
        if getattr(settings, name) != field.get_default(call_default_factory=True):
            key = f"environment.{field.alias or name}"
            raise source.error(key, "there is no environment that it could change: neither environment.class nor tools")
