"""What formats share: packed bits, transforms, and the choice of the fastest backend."""
