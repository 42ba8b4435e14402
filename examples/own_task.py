"""A task of your own, scored by your own code, through the loop's pieces: say a number's double."""

from collections.abc import Sequence

import groupwise as gw


def problem(position: int) -> gw.Problem:
    """The training problem at a position of an endless stream."""
    number = position % 20 + 1
    return gw.Problem(id=f"double {number}", prompt=f"{number}+{number}=", answer=str(2 * number))


def score(problem: gw.Problem, texts: Sequence[str]) -> tuple[gw.Score, ...]:
    """A score for each completion; `correct` is what pass rates and dynamic sampling count."""
    return tuple(gw.Score(reward=float(text == problem.answer), correct=text == problem.answer) for text in texts)


if __name__ == "__main__":
    model, tokenizer = gw.LanguageModel.load("arithmetic-base"), gw.load_tokenizer("arithmetic-base")
    problems = [problem(i) for i in range(20)]
    prompts = [gw.encode_prompt(tokenizer, p.prompt, chat=False) for p in problems]
    asked = gw.requests(prompts, 8, gw.Sampling(max_tokens=16), seed=0)
    answers = gw.generate_all(gw.NativeSampler(model, tokenizer), asked)
    scores = [s for p, group in zip(problems, answers, strict=True) for s in score(p, [c.text for c in group])]
    print(f"pass@1 of the base on doubles: {sum(s.correct for s in scores) / len(scores):.3f}")
