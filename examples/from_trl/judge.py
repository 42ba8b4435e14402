"""An asynchronous reward on messages in TRL's form, which logs a column and a metric."""

import asyncio


async def polite(prompts, completions, log_extra, log_metric, **kwargs):
    """The share of vowels in the answer, as a judge that takes its time might say."""
    await asyncio.sleep(0.01)
    answers = [completion[-1]["content"] for completion in completions]
    scores = [sum(letter in "aeiou" for letter in answer) / max(1, len(answer)) for answer in answers]
    log_extra("question", [prompt[-1]["content"] for prompt in prompts])
    log_metric("longest", float(max(len(answer) for answer in answers)))
    return scores
