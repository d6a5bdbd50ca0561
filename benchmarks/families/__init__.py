"""Which families are right as a student and as a teacher, and on what: `make families`."""
