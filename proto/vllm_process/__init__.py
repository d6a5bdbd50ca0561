"""What teacher and trainer need of the processes of a vLLM engine: their cores, their end."""
