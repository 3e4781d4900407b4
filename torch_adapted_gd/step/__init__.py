"""What a step is computed from: the loss around the present parameters, the system, trials and their judges."""
