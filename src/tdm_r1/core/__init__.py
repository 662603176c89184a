"""Pure maths: rectified flow, solvers, losses, advantages, random numbers. Torch and NumPy alone."""
