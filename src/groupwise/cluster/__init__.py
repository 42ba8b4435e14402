"""A run in several processes: samplers and the learner in processes of their own, started, watched and restarted."""
