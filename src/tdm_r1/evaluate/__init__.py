"""Evaluation: one sampler and one scorer for runs, `eval` and `sample`; tables and pictures."""
