"""What every other package may use: errors, files, the cache, and quantities with their source."""
