"""A teacher and a student small enough to train and distil on two CPU cores."""
