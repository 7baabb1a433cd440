"""Which patches calibrate, how to quantize, what int8 costs."""
