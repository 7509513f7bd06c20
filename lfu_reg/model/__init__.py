"""Reading a model that somebody else wrote, and putting it back as it was."""
