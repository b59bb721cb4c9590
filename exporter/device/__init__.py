"""Named devices: their properties, and whether an artifact fits them."""
