"""What was measured of these models, and what were they made of? One page of any number of runs."""
