"""What selecting tokens does to a model's answers, beside what codecs do at the same bytes."""
