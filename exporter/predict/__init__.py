"""Predicts speed, memory and energy of a model on a device from facts and measurements."""
