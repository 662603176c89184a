"""Rewards: black boxes from a batch of images and prompts to one score a sample. Nothing needs a gradient."""
