"""Guards taken out one at a time, each with the test that has to fail then: `make mutants`."""
