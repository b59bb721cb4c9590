"""What is asked for, and what a build will do about it: decided before a weight is read."""
