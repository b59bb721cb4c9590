"""Work in child processes: without a network, under limits, and asked through a pipe that carries data alone."""
