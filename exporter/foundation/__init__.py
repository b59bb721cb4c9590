"""Common base of all packages: errors, files, the cache, and quantities with their source."""
