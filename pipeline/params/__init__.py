"""The sections of kdpipe.yaml as types, one file each."""
