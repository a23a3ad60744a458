"""Scaling studies: a grid of runs, its results, its scaling-law fits and plots."""
