"""Stages of the pipeline that belong to no other package, and the time and memory that stages take."""
