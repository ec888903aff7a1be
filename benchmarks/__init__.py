"""Speed and memory of flatopt against what one would use instead, as ratios."""
