"""The front door of musplit: the command line, nothing else."""
