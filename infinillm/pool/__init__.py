"""The pool: one conversation between those who ask about K/V and those who keep it."""
