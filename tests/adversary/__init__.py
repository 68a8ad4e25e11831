"""Wrong input by the hundred: what is done to a good file, and what becomes of it."""
