"""Data formats, one file each; the table of them is pipeline/params/formats.py."""
