"""Reports on recorded runs. They read run directories only, so a run made on another machine or by an earlier version can be shown."""
