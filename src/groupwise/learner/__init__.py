"""Log-probabilities of completions, and the optimiser step on them."""
