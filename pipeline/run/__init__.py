"""The run itself: manifest, digests, state, runner, config, errors."""
