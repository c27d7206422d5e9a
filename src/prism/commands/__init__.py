"""The commands of `prism`: one file a command, its settings and its `run`."""
