"""What codecs do to a model's answers, measured on the model: `docs/quality.md` is the table."""
