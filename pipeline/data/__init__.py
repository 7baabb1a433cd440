"""The user's files as splits, and the dataset that later stages read."""
