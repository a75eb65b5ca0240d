"""The verbs, one a file: its models, its endpoint."""
