"""Calibration: texts, the float model run layer by layer, and statistics of its activations."""
