"""What strength, displacement and the step with one backward do: the runs behind docs/choosing-a-strength.md."""
