"""The pool's slots, and who holds which of them still."""
