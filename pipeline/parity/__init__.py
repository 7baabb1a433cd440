"""Proof that training tensor, PNG, YAML, ONNX and int8 agree."""
