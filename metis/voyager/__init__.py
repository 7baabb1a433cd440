"""The backend on the Voyager SDK: its YAML, its child process, its artifacts."""
