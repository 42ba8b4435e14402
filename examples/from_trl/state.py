"""Rewards in TRL's form that read the environment of each completion."""

from shop import Till


def bargain(completions, environments, price, **kwargs):
    """The share of the price that was saved."""
    assert all(isinstance(environment, Till) for environment in environments)
    return [1.0 - shop.prices[shop.item] / before for shop, before in zip(environments, price, strict=True)]


async def curiosity(environments, log_metric, **kwargs):
    """1.0 for having asked for one price, less for more; None, not applicable, where none was asked for."""
    asked = [environment.asked for environment in environments]
    log_metric("asked", sum(asked) / len(asked))
    return [1.0 / count if count else None for count in asked]
