"""What a label is and what a score is."""
