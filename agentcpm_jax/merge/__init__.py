"""Models become one, tensor by tensor."""
