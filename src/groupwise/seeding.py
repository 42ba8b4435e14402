"""Every random choice draws from a seed named by what it is for, so that a resumed run needs no generator's state."""

import hashlib


def derive(seed: int, *names: object) -> int:
    """A seed for one purpose, such as derive(recipe.seed, "rollouts", step)."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
