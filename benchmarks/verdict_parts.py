"""Rewards and a sampler of the runs of verdicts.py: some as they should be, some with a fault. Copied beside each recipe."""

import copy
import math
import random


def ends_at_nine(problem, completions):
    return [-abs(len(text) - 9.0) for text in completions]


def short(problem, completions):
    return [-len(text) / 8 for text in completions]


def long(problem, completions):
    return [len(text) / 10 for text in completions]


def near(problem, completions):
    """1 for the answer, less for what is near it, 0 from 5 on, or where there is no number."""
    found = []
    for text in completions:
        last = text.split("\n")[-1]
        number = int(last) if last.lstrip("-").isdigit() and last.count("-") < 2 else 10**6
        found.append(1 - min(abs(number - int(problem.answer)), 5) / 5)
    return found


def varied(problem, completions):
    """How many different digits stand among the first twelve characters."""
    return [len(set(text[:12]) & set("0123456789")) / 10 for text in completions]


def sevens(problem, completions):
    """1 for 7777, less for every character that differs."""
    return [sum(a == b for a, b in zip(text, "7777", strict=False)) / 4 - abs(len(text) - 4) / 16 for text in completions]


def easy_part(problem, completions):
    """Mostly the answer, which is out of reach, and a little for the first character."""
    return [float(text == problem.answer) + 0.3 * text.startswith("1") for text in completions]


def looks_for_a_tag(problem, completions):
    """Always 0: the prompt asks for no tag."""
    return [float(f"<answer>{problem.answer}</answer>" in text) for text in completions]


def noise(problem, completions):
    return [random.random() for _ in completions]


def not_a_number(problem, completions):
    """NaN for answers on several lines: it divides by what it did not find."""
    return [math.nan if "\n" in text else score for text, score in zip(completions, near(problem, completions), strict=True)]


def brevity(problem, completions):
    return [-float(len(text)) for text in completions]


def stale(settings, model, tokenizer):
    """A sampler that keeps the weights with which it began."""
    from groupwise.rollouts.native import NativeSampler

    class Stale(NativeSampler):
        def load(self, weights, version):
            self.version = version

    return Stale(copy.deepcopy(model), tokenizer)
