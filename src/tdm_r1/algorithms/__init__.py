"""Algorithms: TDM-R1 (`tdm_r1.TDMR1.step` is Algorithm 1), TDM below it, and what they have in common."""
