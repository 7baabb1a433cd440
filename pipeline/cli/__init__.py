"""Words in, lines out: the command line, one file per group of commands."""
