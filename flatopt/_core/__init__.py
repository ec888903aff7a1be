"""What all rooms share: trees, data, loops, random bits, checks. No public names."""
