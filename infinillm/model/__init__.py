"""Dense layers, weights, tokens: everything about a model that is not attention."""
