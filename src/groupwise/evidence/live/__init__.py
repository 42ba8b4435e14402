"""`groupwise watch`: the page about runs, served while they go on."""
