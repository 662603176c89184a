"""Training: a run and its folder, checkpoints, scoring, trackers, the estimate of what a run needs."""
