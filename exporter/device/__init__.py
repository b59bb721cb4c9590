"""Named devices: what they are and can do, and whether an artifact fits them."""
