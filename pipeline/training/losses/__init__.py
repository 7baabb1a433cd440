"""Losses, one file each; the soft ones are listed in `pipeline.params.losses`."""
