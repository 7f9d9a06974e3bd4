"""Many requests from a file, answered into another one, with as many starts as it takes."""
