"""A package outside tdm_r1 that adds one component of every kind; a test trains with them by their names."""
