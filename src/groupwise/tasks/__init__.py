"""Where problems come from and how one answer is judged."""
