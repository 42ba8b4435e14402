"""Many runs, compared: ladders of settings."""
