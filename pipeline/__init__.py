"""The run: stages that talk only through a manifest."""
