"""Models, oracles and loops that the tests share."""
