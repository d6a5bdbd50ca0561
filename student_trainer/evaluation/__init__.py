"""What the student's present weights make of held-out problems: right answers, and how far from the
teacher. Knows neither grpc nor torch: it is given a sampler, sessions and a tokenizer."""
