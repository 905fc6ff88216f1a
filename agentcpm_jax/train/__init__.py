"""Steps: gradients, optimisers, placement on a mesh."""
