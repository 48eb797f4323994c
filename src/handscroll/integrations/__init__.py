"""handscroll inside other libraries' objects."""
