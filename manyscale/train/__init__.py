"""How to learn: the loop and what it needs, for every task."""
