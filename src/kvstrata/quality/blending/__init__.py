"""What reuse at any position does to a model's answers, measured for each plan and ratio."""
