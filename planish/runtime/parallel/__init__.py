"""Runs programs that work on one model together: in lock-step on a CPU, or one process for each GPU."""
