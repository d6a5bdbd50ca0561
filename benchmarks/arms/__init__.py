"""What is compared: one class a way to get a teacher's scores."""
