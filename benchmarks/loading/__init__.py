"""How much memory a rank needs to load a model and to write it, and how long that takes."""
