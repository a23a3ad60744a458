"""Running on a SLURM cluster: submitting jobs, what their nodes start, and checking nodes before a run."""
