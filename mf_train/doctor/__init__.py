"""`doctor`: what a machine has, what computes there and how fast, and what would make it faster."""
