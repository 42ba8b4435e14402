"""What runs show: read from their directories only, so that it works on runs of any machine and any age."""
