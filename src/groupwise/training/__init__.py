"""The loop that ties rollouts and learner together, and what it keeps: checkpoints, metrics, rollouts to read."""
