"""Settings to objects, and objects to a run. The only package that chooses implementations."""
