"""What a step costs, and what estimates of it lose: the runs behind docs/cost.md and docs/scaling.md."""
