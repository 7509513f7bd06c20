"""The step: what each of its lines does, and what it is checked for."""
