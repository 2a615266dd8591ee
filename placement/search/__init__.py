"""What all searches share: starts by packing, annealing, swaps, the hedge against the sample, alignment of layers."""
