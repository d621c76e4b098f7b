"""Training the parts of a model: the loop, the losses, and the judging of the result."""
