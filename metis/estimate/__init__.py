"""The frame rate before there is a card."""
