"""Real devices: a way to reach one, a folder on it, and what it is. One file a transport."""
