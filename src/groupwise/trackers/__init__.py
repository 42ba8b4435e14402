"""Trackers: where a run is told to beside its own directory, each in a process that reads that directory and sends it on."""
