"""ONNX graphs: views, edits, ends, sessions; knows nothing of the chip."""
