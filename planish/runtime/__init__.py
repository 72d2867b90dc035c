"""Runtime: what compiles, runs, measures, reports and stores a Program. Imports neither torch nor the passes."""
