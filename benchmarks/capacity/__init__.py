"""How many trainers a teacher serves: the arithmetic of docs/scaling.md, and a simulation of it."""
