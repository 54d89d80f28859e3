"""A tiny VILA that learns to read pictures it draws itself."""
