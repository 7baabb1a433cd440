"""Torch networks by name: weights, export, inference on the host, fitness for the chip."""
