"""Forward hooks, and one pass through the model that they serve."""
