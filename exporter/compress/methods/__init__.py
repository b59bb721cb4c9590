"""Ways to choose the codes of a matrix, one file each."""
