"""The chip's operator rules, verdicts and exact rewrites."""
