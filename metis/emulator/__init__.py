"""The backend on the host's CPU: an honest int8 emulation."""
