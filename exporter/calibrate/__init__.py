"""Calibration: texts, the float model run layer by layer, and what its activations tell."""
