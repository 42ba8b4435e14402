"""What a recipe takes on given GPUs, found without them: memory, times, and a simulation of the run."""
