"""`make demo-language`: SmolLM2-135M-Instruct distilled into a student with fewer of its layers."""
