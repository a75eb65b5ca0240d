"""Objects as a tier keeps them: which codec, and through it both ways."""
