"""The squared difference over layers against its opponents: time, memory, and bandwidth on a GPU."""
