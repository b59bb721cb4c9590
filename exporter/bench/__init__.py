"""Measuring a bundle, on this machine or on a device: one cycle and one measuring program for both."""
