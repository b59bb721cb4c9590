"""Measurement of a bundle, on this machine or on a device, with one procedure and one program for both."""
